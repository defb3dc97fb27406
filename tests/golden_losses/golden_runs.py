"""Eight steps of each quickstart on few short rows: how they run, and the curves that they record."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from align import load_recipe, run
from finetune.recipe.discovery import PROJECT
from finetune.recipe.recipe import stage_settings
from finetune.recipe.settings import Section

STEPS = 8
FOLDER = Path(__file__).parent
DATA = PROJECT / "recipes" / "tiny" / "data"
Curves = dict[str, list[Any]]

SUPERVISED = ("sft", "pretrain", "reward", "dpo", "kto", "chain_of_hindsight")
SAMPLING = ("ppo", "rejection", "rloo", "grpo")
CASES = (*SUPERVISED, *SAMPLING, "sft-trl", "dpo-trl", "reward-trl")
"""Stages with the native engine (RLOO and GRPO are TRL's), and three with TRL's."""
PARENTS = {"dpo": ("sft",), "kto": ("sft",), "dpo-trl": ("sft",)} | dict.fromkeys(SAMPLING, ("sft", "reward"))
"""The cases whose runs a case starts from: the policy, and what it is rewarded by."""

SMALL = {
    "train.max_steps": STEPS,
    "train.log_every": 1,
    # Low: at the quickstarts' rates a few steps amplify the rounding of another CPU to 1e-4 and more.
    "train.learning_rate": 2e-5,
    "train.batch_size": 4,
    "data.held_out": 4,
    "data.cache": False,
    "evaluate.samples": 1,
    "evaluate.max_new_tokens": 4,
    "evaluate.exact_match": 0,
    "evaluate.graders": {},
    "evaluate.retention": None,
    "sampling.max_new_tokens": 8,
}
"""Overrides of every stage that has these settings."""
FURTHER: dict[str, dict[str, Any]] = {
    # Its few steps are stable at a high rate, and teach the parent of the others to end its replies.
    "sft": {"train.learning_rate": 2e-3},
    "pretrain": {"data.max_length": 64, "data.separator": "\n\n"},
    "ppo": {"ppo.rollout_size": 8},
    "rejection": {"rejection.rounds": 1, "rejection.prompts": 6, "train.batch_size": 2},
    "sft-trl": {"train.engine": "trl"},
    "dpo-trl": {"train.engine": "trl", "dpo.loss": "dpo"},
    "reward-trl": {"train.engine": "trl"},
}
ROWS = {"sft": "sft_train.jsonl", "pretrain": "in_house.txt", "reward": "story_preferences_train.jsonl"}
ROWS |= dict.fromkeys(SAMPLING, "prompts_train.jsonl")
NUM_ROWS, NUM_DOCUMENTS = 44, 60
MEASURED = ("seconds", "time/", "runtime", "per_second", "memory")
"""Parts of names of metrics that measure the machine and not the run."""


def golden_run(case: str, root: Path) -> Path:
    """Return the finished run of a case; the processes of one test session share ``root`` and its runs."""
    parents = [golden_run(parent, root) for parent in PARENTS.get(case, ())]
    out = root / case
    with FileLock(f"{out}.lock"):
        if not out.exists():
            train(case, parents, _short_rows(case, root), out)
    return out


def train(case: str, parents: list[Path], rows: Path, out: Path) -> None:
    """Train the quickstart of a case on some rows."""
    stage = case.removesuffix("-trl")
    sections = stage_settings(stage).model_fields
    common = {key: value for key, value in SMALL.items() if _has(sections, key)}
    recipe = load_recipe(
        "quickstart",
        stage=stage,
        data=str(rows),
        init_from=parents[0] if parents else None,
        reward=parents[1] if len(parents) > 1 else None,
        out=out,
        settings=common | FURTHER.get(case, {}),
    )
    run(recipe)


def _has(sections: Any, dotted: str) -> bool:
    section, key = dotted.split(".")
    annotation = sections[section].annotation if section in sections else None
    return isinstance(annotation, type) and issubclass(annotation, Section) and key in annotation.model_fields


def _short_rows(case: str, root: Path) -> Path:
    """Write the first short rows of a quickstart's data: those as long as a quarter of them at most."""
    source = DATA / ROWS.get(case.removesuffix("-trl"), "preferences_train.jsonl")
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".txt":
        short = "\n\n".join(text.split("\n\n")[:NUM_DOCUMENTS])
    else:
        lines = text.splitlines(keepends=True)
        quarter = sorted(map(len, lines))[len(lines) // 4]
        short = "".join([line for line in lines if len(line) <= quarter][:NUM_ROWS])
    path = root / f"{case}-{source.name}"
    path.write_text(short, encoding="utf-8")
    return path


def curves(out: Path) -> Curves:
    """Return the metrics of a run by name, in the order of its steps."""
    found: Curves = {}
    for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        for name, value in json.loads(text).items():
            if not any(part in name for part in MEASURED):
                found.setdefault(name, []).append(value)
    return found


def golden_file(case: str) -> Path:
    return FOLDER / f"{case}.json"


def read_golden(case: str) -> Curves:
    found: Curves = json.loads(golden_file(case).read_text(encoding="utf-8"))
    return found


def write_golden(case: str, found: Curves) -> None:
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
    golden_file(case).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def differences(expected: Curves, found: Curves, relative: float = 1e-4, absolute: float = 1e-5) -> list[str]:
    """Return a line for each curve that differs from the expected one.

    Args:
        expected: the golden curves.
        found: those of a run.
        relative: largest difference, as a share of the curve's largest value: losses around 0 are differences
            of larger numbers.
        absolute: largest difference at least: log-ratios and margins are differences of log-probabilities,
            whose rounding they have. A learning rate has none.
    """
    lines = [f"{name}: only in one of both" for name in sorted(expected.keys() ^ found.keys())]
    for name in sorted(expected.keys() & found.keys()):
        one, other = expected[name], found[name]
        largest = max((abs(value) for value in one), default=0.0)
        limit = max(relative * largest, 0.0 if name == "learning_rate" else absolute)
        # `not all`: NaN is unequal to everything, and greater than nothing.
        if len(one) != len(other) or not all(abs(a - b) <= limit for a, b in zip(one, other, strict=True)):
            lines.append(f"{name}: expected {one}, found {other}")
    return lines
