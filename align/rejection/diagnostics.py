"""Metrics of rejection sampling: of a round, of held-out completions; curves, summary, table of rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.rejection.rounds import round_folder
from align.rejection.selection import Candidate, mean_best_of_n
from align.rejection.settings import Settings
from align.rl.completions import KeepGraded
from align.rl.prompts import Prompts
from align.rl.reward_finding import reward_finding
from align.rl.rewards.rewards import RewardScores
from align.rl.rollout_log import replace_rollouts, rollout_entries
from data_templates.segments import Message
from finetune.evaluation.small_samples import MeanChange
from finetune.recipe.user_arguments import prompt_text
from finetune.training.findings import Finding
from finetune.training.generation_eval import Graders, mean_grade
from finetune.training.held_out_file import graded_entry
from finetune.training.metric_specs import Diagnostics, MetricSpec
from finetune.training.metrics import EVAL_PREFIX, GOLD_PREFIX
from finetune.training.preflight.checks import CheckResult
from finetune.training.run_directory import METRICS, SELECTED, RunDirectory

MAX_EQUAL_REWARD_FRACTION = 0.5
"""Fraction of prompts with equal rewards from which the selection is mostly arbitrary."""
ROUND_COLUMNS = {
    "prompts": ("prompts", ",d"),
    "completions": ("completions", ",d"),
    "val/eos_rate": ("EOS rate", ".1%"),
    "objective/reward": ("mean reward", ".3f"),
    "objective/frac_reward_zero_std": ("prompts with equal rewards", ".0%"),
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
    return MetricSpec(
        curves=curves | grader_curves,
        summary=summary,
        diagnostics=rounds_diagnostics,
        main="objective/reward",
    )


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


def diagnose_rejection(reward: MeanChange | None) -> list[Finding]:
    """Return the findings of a run: the change of the held-out reward; empty without held-out prompts."""
    return [] if reward is None else [reward_finding(reward, raise_gain="raise train.learning_rate")]


def equal_reward_fraction(candidates: Sequence[Candidate]) -> float:
    """Return the fraction of prompts whose completions all have the same reward."""
    rewards: dict[int, set[float]] = {}
    for candidate in candidates:
        rewards.setdefault(candidate.prompt_index, set()).add(candidate.reward)
    return float(np.mean([len(values) == 1 for values in rewards.values()]))


def check_equal_rewards(fraction: float, names: Sequence[str]) -> list[CheckResult]:
    """Check that the rewards of most prompts differ between completions; empty if so, else a warning."""
    if fraction < MAX_EQUAL_REWARD_FRACTION:
        return []
    detail = f"all completions of {fraction:.0%} of the prompts have equal rewards: the first one is selected"
    reward = " and ".join(names)
    repair = f"a finer reward than {reward}, or raise sampling.temperature or rejection.num_generations"
    return [CheckResult("equal rewards", f"{detail}; {repair}", warned=True)]


def round_metrics(candidates: Sequence[Candidate], selected: Sequence[Candidate]) -> dict[str, Any]:
    """Return a round's metrics: of all its completions and of the selected ones."""
    return {
        "completions": len(candidates),
        "val/eos_rate": float(np.mean([candidate.ended_with_eos for candidate in candidates])),
        "objective/reward": float(np.mean([candidate.reward for candidate in candidates])),
        "objective/frac_reward_zero_std": equal_reward_fraction(candidates),
        "chosen": len(selected),
        "objective/chosen_reward": float(np.mean([candidate.reward for candidate in selected])),
    }


def held_out_metrics(
    candidates: Sequence[Candidate],
    prompts: Prompts,
    *,
    num_generations: int,
    reward_names: Sequence[str],
    graders: Graders,
    keep: KeepGraded | None = None,
) -> dict[str, float]:
    """Return the mean reward, the mean best of n, the EOS rate, and the graders' means.

    Args:
        candidates: completions of held-out prompts, the ``num_generations`` of a prompt consecutively.
        prompts: the held-out prompts.
        num_generations: completions per prompt (n).
        reward_names: rewards whose means are metrics of their own.
        graders: Python graders.
        keep: receives the entries of held_out.jsonl.

    Raises:
        UserError: a grader raised, returned no number, or skipped every completion.
    """
    rewards = np.array([candidate.reward for candidate in candidates])
    metrics = {
        "objective/reward": float(rewards.mean()),
        "objective/best_of_n_reward": mean_best_of_n(rewards.reshape(-1, num_generations)),
        "val/eos_rate": float(np.mean([candidate.ended_with_eos for candidate in candidates])),
    }
    for name in reward_names:
        metrics[f"rewards/{name}"] = float(np.mean([candidate.by_source[name] for candidate in candidates]))
    prompt_of = {index: prompts[index] for index in {candidate.prompt_index for candidate in candidates}}
    rows = [
        graders.row(prompt.messages, candidate.text, prompt.location, prompt.expected)
        for candidate in candidates
        for prompt in (prompt_of[candidate.prompt_index],)
    ]
    grades = graders.grade(rows)
    if keep is not None:
        keep(
            [
                graded_entry(
                    row,
                    ended_with_eos=candidate.ended_with_eos,
                    grades={name: values[index] for name, values in grades.items()},
                    reward=candidate.reward,
                    rewards=dict(candidate.by_source),
                )
                for index, (row, candidate) in enumerate(zip(rows, candidates, strict=True))
            ]
        )
    return metrics | {f"{GOLD_PREFIX}{name}": mean_grade(name, values) for name, values in grades.items()}


def write_selected(
    run: RunDirectory,
    prompts: Prompts,
    candidates: Sequence[Candidate],
    selected: Sequence[Candidate],
    *,
    round_index: int,
) -> None:
    """Write ``chosen.jsonl``: the entries of earlier rounds and of this one."""
    # A round that runs again replaces its own entries.
    entries = [entry for entry in run.read_jsonl(SELECTED) if entry["round"] < round_index]
    rewards: dict[int, list[float]] = {}
    for candidate in candidates:
        rewards.setdefault(candidate.prompt_index, []).append(candidate.reward)
    for candidate in selected:
        prompt_rewards = rewards[candidate.prompt_index]
        entry = {
            "prompt": _prompt_text(prompts, candidate),
            "reply": candidate.text,
            "reward": candidate.reward,
            "n": len(prompt_rewards),
            "mean": float(np.mean(prompt_rewards)),
            "round": round_index,
            "place": prompts[candidate.prompt_index].location,
        }
        has_several = len(candidate.by_source) > 1
        entries.append({**entry, "rewards": dict(candidate.by_source)} if has_several else entry)
    run.write_jsonl(SELECTED, entries)


def write_rollouts(
    run: RunDirectory, prompts: Prompts, candidates: Sequence[Candidate], *, round_index: int
) -> None:
    """Write a round's completions to rollouts.jsonl; a round that runs again replaces its own."""
    names = list(candidates[0].by_source)
    scores = RewardScores(
        np.array([candidate.reward for candidate in candidates]),
        {name: np.array([candidate.by_source[name] for candidate in candidates]) for name in names},
    )
    entries = rollout_entries(
        round_index,
        [prompts[candidate.prompt_index] for candidate in candidates],
        [candidate.text for candidate in candidates],
        scores,
        [candidate.ended_with_eos for candidate in candidates],
    )
    replace_rollouts(run, entries)


def write_metrics(run: RunDirectory, spec: MetricSpec, *, round_index: int) -> None:
    """Write ``metrics.jsonl`` up to a round: the steps of all rounds, concatenated."""
    rounds = run.record.get("rounds", {})

    def curve_values(index: int) -> dict[str, Any]:
        entry = rounds.get(str(index), {})
        return {key: value for key, value in entry.items() if key in spec.logged_keys}

    entries = [{"step": 0, "epoch": 0.0, **curve_values(0)}]
    for past_round in range(1, round_index + 1):
        round_run = RunDirectory(round_folder(run.path, past_round), run.recipe, "")
        step = entries[-1]["step"]
        entries += [{**entry, "step": step + entry["step"]} for entry in round_run.metrics()]
        entries[-1] |= curve_values(past_round)
    # Without held-out prompts nothing was measured at step 0.
    run.write_jsonl(METRICS, entries if len(entries[0]) > 2 else entries[1:])


def _prompt_text(prompts: Prompts, candidate: Candidate) -> str:
    messages = prompts[candidate.prompt_index].messages
    return prompt_text([*messages, Message("assistant", candidate.text)])
