"""Metrics of rejection sampling: curves, summary before and after training, table of rounds."""

from collections.abc import Mapping
from typing import Any

from align.rejection.settings import Settings
from finetune.training.watched import Panel, Watched

HELD_OUT = "held_out_"
GOLD = "judged_"
COLUMNS = {
    "prompts": ("prompts", ",d"),
    "replies": ("completions", ",d"),
    "ends": ("EOS rate", ".1%"),
    "reward": ("mean reward", ".3f"),
    "chosen": ("selected", ",d"),
    "chosen_reward": ("mean reward of selected", ".3f"),
    "rows": ("training rows", ",d"),
    "held_out_reward": ("held-out reward after", ".3f"),
    "held_out_best": ("held-out best of n", ".3f"),
}
"""Key of a round's entry in run.json -> column title and format."""


def watched(settings: Settings) -> Watched:
    """Return the curves and summary metrics for the recipe's rewards and graders."""
    count = settings.rejection.samples
    sources = [source.called for source in settings.reward.sources]
    curves = {
        "loss": "training loss (nats per trained token)",
        "reward": "reward of completions (mean)",
        "chosen_reward": "reward of selected completions (mean)",
        "held_out_reward": "held-out reward of completions (mean)",
        "held_out_best": f"held-out reward, best of {count} (mean)",
        "held_out_ends": "held-out EOS rate",
    }
    if len(sources) > 1:
        curves |= {f"{HELD_OUT}reward_{name}": f"held-out reward: {name}" for name in sources}
    gold = {f"{HELD_OUT}{GOLD}{name}": f"grader: {name} (completions)" for name in settings.evaluate.judges}
    numbers = {
        "held_out_reward": ("held-out reward", ".3f"),
        "held_out_best": (f"held-out reward, best of {count}", ".3f"),
        "held_out_ends": ("held-out EOS rate", ".1%"),
        **{key: (title, ".3f") for key, title in gold.items()},
    }
    return Watched(curves=curves | gold, numbers=numbers, panel=rounds_panel)


def rounds_panel(record: Mapping[str, Any]) -> Panel:
    """Return the report's table of rounds."""
    rounds: dict[str, dict[str, Any]] = record["rounds"]
    keys = dict.fromkeys(key for entry in rounds.values() for key in entry)
    gold = {key: key.removeprefix(HELD_OUT) for key in keys if key.startswith(HELD_OUT + GOLD)}
    columns = COLUMNS | {key: (f"{name.replace('_', ': ', 1)} after", ".3f") for key, name in gold.items()}
    known = {key: column for key, column in columns.items() if key in keys}
    lines = [["round", *(title for title, _ in known.values())]]
    for number, entry in rounds.items():
        cells = [f"{entry[key]:{style}}" if key in entry else "" for key, (_, style) in known.items()]
        lines.append(["start" if number == "0" else number, *cells])
    return Panel(tables={"Rounds": lines})
