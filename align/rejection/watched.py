"""What a reader of a rejection run looks at: rewards over the rounds, and numbers before and after."""

from collections.abc import Mapping
from typing import Any

from align.rejection.settings import Settings
from finetune.training.watched import Panel, Watched

HELD_OUT = "held_out_"
GOLD = "judged_"
COLUMNS = {
    "prompts": ("prompts", ",d"),
    "replies": ("replies drawn", ",d"),
    "ends": ("ended", ".1%"),
    "reward": ("mean reward", ".3f"),
    "chosen": ("learnt of them", ",d"),
    "chosen_reward": ("mean reward of these", ".3f"),
    "rows": ("rows of the round", ",d"),
    "held_out_reward": ("held-out reward after it", ".3f"),
    "held_out_best": ("held-out best of n", ".3f"),
}
"""A round's entry in run.json -> the head of its column and its format."""


def watched(settings: Settings) -> Watched:
    """Return the curves and numbers of a run with these rewards and judges."""
    count = settings.rejection.samples
    sources = [source.called for source in settings.reward.sources]
    curves = {
        "loss": "training loss (nats per trained token)",
        "reward": "reward of drawn replies (mean)",
        "chosen_reward": "reward of the chosen ones (mean)",
        "held_out_reward": "reward of drawn replies to held-out prompts (mean)",
        "held_out_best": f"reward of the best of {count} (held-out, mean)",
        "held_out_ends": "share of held-out replies that end",
    }
    if len(sources) > 1:
        curves |= {f"{HELD_OUT}reward_{name}": f"held-out reward: {name}" for name in sources}
    gold = {f"{HELD_OUT}{GOLD}{name}": f"judge: {name} (drawn replies)" for name in settings.evaluate.judges}
    numbers = {
        "held_out_reward": ("held-out reward", ".3f"),
        "held_out_best": (f"held-out reward, best of {count}", ".3f"),
        "held_out_ends": ("held-out replies that end", ".1%"),
        **{key: (title, ".3f") for key, title in gold.items()},
    }
    return Watched(curves=curves | gold, numbers=numbers, panel=rounds_panel)


def rounds_panel(record: Mapping[str, Any]) -> Panel:
    """Return the table of the rounds."""
    rounds: dict[str, dict[str, Any]] = record["rounds"]
    keys = dict.fromkeys(key for entry in rounds.values() for key in entry)
    gold = {key: key.removeprefix(HELD_OUT) for key in keys if key.startswith(HELD_OUT + GOLD)}
    columns = COLUMNS | {key: (f"{name.replace('_', ': ', 1)} after it", ".3f") for key, name in gold.items()}
    known = {key: column for key, column in columns.items() if key in keys}
    lines = [["round", *(title for title, _ in known.values())]]
    for number, entry in rounds.items():
        cells = [f"{entry[key]:{style}}" if key in entry else "" for key, (_, style) in known.items()]
        lines.append(["start" if number == "0" else number, *cells])
    return Panel(tables={"Rounds": lines})
