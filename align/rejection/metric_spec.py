"""Metrics of rejection sampling: curves, summary before and after training, table of rounds."""

from collections.abc import Mapping
from typing import Any

from align.rejection.settings import Settings
from finetune.training.metric_specs import Diagnostics, MetricSpec
from finetune.training.metrics import EVAL_PREFIX, GOLD_PREFIX

ROUND_COLUMNS = {
    "prompts": ("prompts", ",d"),
    "completions": ("completions", ",d"),
    "val/eos_rate": ("EOS rate", ".1%"),
    "objective/reward": ("mean reward", ".3f"),
    "chosen": ("selected", ",d"),
    "objective/chosen_reward": ("mean reward of selected", ".3f"),
    "rows": ("training rows", ",d"),
    "eval/objective/reward": ("held-out reward after", ".3f"),
    "eval/objective/best_of_n_reward": ("held-out best of n", ".3f"),
}
"""Key of a round's entry in run.json -> column title and format."""


def rejection_metric_spec(settings: Settings) -> MetricSpec:
    """Return the curves and summary metrics for the recipe's rewards and graders."""
    num_generations = settings.rejection.num_generations
    reward_names = [source.metric_name for source in settings.rewards.sources]
    curves = {
        "loss": "training loss (nats per trained token)",
        "objective/reward": "reward of completions (mean)",
        "objective/chosen_reward": "reward of selected completions (mean)",
        "eval/objective/reward": "held-out reward of completions (mean)",
        "eval/objective/best_of_n_reward": f"held-out reward, best of {num_generations} (mean)",
        "eval/val/eos_rate": "held-out EOS rate",
    }
    if len(reward_names) > 1:
        curves |= {f"{EVAL_PREFIX}rewards/{name}": f"held-out reward: {name}" for name in reward_names}
    grader_curves = {
        f"{EVAL_PREFIX}{GOLD_PREFIX}{name}": f"grader: {name} (completions)"
        for name in settings.evaluate.graders
    }
    summary = {
        "eval/objective/reward": ("held-out reward", ".3f"),
        "eval/objective/best_of_n_reward": (f"held-out reward, best of {num_generations}", ".3f"),
        "eval/val/eos_rate": ("held-out EOS rate", ".1%"),
        **{key: (title, ".3f") for key, title in grader_curves.items()},
    }
    return MetricSpec(curves=curves | grader_curves, summary=summary, diagnostics=rounds_diagnostics)


def rounds_diagnostics(record: Mapping[str, Any]) -> Diagnostics:
    """Return the report's table of rounds."""
    rounds: dict[str, dict[str, Any]] = record["rounds"]
    keys = dict.fromkeys(key for entry in rounds.values() for key in entry)
    prefix = EVAL_PREFIX + GOLD_PREFIX
    grader_columns = {
        key: (f"grader: {key.removeprefix(prefix)} after", ".3f") for key in keys if key.startswith(prefix)
    }
    columns = ROUND_COLUMNS | grader_columns
    present = {key: column for key, column in columns.items() if key in keys}
    rows = [["round", *(title for title, _ in present.values())]]
    for round_index, entry in rounds.items():
        cells = [
            f"{entry[key]:{format_spec}}" if key in entry else "" for key, (_, format_spec) in present.items()
        ]
        rows.append(["start" if round_index == "0" else round_index, *cells])
    return Diagnostics(tables={"Rounds": rows})
