"""Small runs of stage rejection: random base, prompts, a reward function."""

import json
from pathlib import Path
from typing import Any

from align import load_recipe
from finetune.recipe.recipe import Recipe

PROGRAM = """\
def letters(prompt, completion):
    return sum(letter in "aeiou" for letter in completion) - len(completion) / 10
"""
PROMPTS = [{"prompt": f"Add the numbers. {i} {i % 3}"} for i in range(14)]


def write(folder: Path) -> Path:
    """Write prompts and a reward function."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (folder / "mine.py").write_text(PROGRAM)
    return folder


def settings(folder: Path, base: Path, **more: Any) -> dict[str, Any]:
    """Return recipe settings; keyword arguments have two underscores in place of the dot."""
    given = {
        "model.base": str(base),
        "model.precision": "float32",
        "model.init_from": None,
        "data.source": str(folder / "prompts.jsonl"),
        "data.held_out": 4,
        "data.template": "alpaca",
        "data.cache": False,
        "adapter.method": "lora",
        "train.epochs": 2,
        "train.batch_size": 4,
        "train.learning_rate": 1e-2,
        "evaluate.samples": 2,
        "evaluate.graders": {},
        "evaluate.retention": None,
        "evaluate.max_new_tokens": 6,
        "rewards.sources": f"{folder}/mine.py:letters",
        "sampling.max_new_tokens": 8,
        "rejection.rounds": 2,
        "rejection.prompts": 6,
        "rejection.num_generations": 3,
        "rejection.keep": "best_of_n",
        "rejection.top_fraction": None,
        "rejection.truncated": "train",
    }
    return given | {key.replace("__", "."): value for key, value in more.items()}


def recipe(folder: Path, base: Path, out: Path, **more: Any) -> Recipe:
    """Return a recipe whose run is written to ``out``."""
    return load_recipe("quickstart", stage="rejection", out=out, settings=settings(folder, base, **more))
