"""Whole runs of preference tuning in a temporary folder, on right sums preferred to wrong ones."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.recipe.recipe import Recipe, read_recipe
from finetune.training.result import Result
from finetune.training.stage import run_stage

sys.path += [str(Path(__file__).parents[2] / "finetune" / "training")]
RECIPE = """\
stage: dpo
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 6, max_length: 128}}
adapter: {{method: lora, rank: 4, dropout: 0.0}}
train: {{max_steps: 3, batch_size: 8, micro_batch_size: 4, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 2, max_new_tokens: 4}}
"""
Recipes = Callable[..., Recipe]
Runs = Callable[..., Result]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 48 pairs: the sum and another number, of different lengths."""
    rows = [
        {
            "prompt": f"Add the numbers.{' Please.' * (i % 5)} {i} {i % 7}",
            "chosen": f"{i + i % 7}",
            "rejected": f"The number {i + 9} {'and then ' * (i % 3)}",
        }
        for i in range(48)
    ]
    return _written(tmp_path_factory, "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def lists_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 24 ranked lists of 3 or 4, a tie in some of them."""
    rows = [
        {
            "prompt": f"Add the numbers. {i} {i % 7}",
            "responses": [f"{i + i % 7}", f"{i} and {i % 7}", "no", "numbers"][: 3 + i % 2],
            "scores": [3.0, 1.5, 0.0, 0.0][: 3 + i % 2],
        }
        for i in range(24)
    ]
    return _written(tmp_path_factory, "lists.jsonl", rows)


def _written(factory: pytest.TempPathFactory, name: str, rows: list[dict[str, Any]]) -> Path:
    path = factory.mktemp("preferences") / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def preference_recipe(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, pairs_file: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "sums.yaml"
    path.write_text(RECIPE.format(base=base_folder, rows=pairs_file), encoding="utf-8")
    return path


@pytest.fixture
def dpo_recipe(preference_recipe: Path, tmp_path: Path) -> Recipes:
    """Return a function: the run's name and further settings in, a recipe out."""

    def make(name: str = "run", *, words: tuple[str, ...] = (), **settings: Any) -> Recipe:
        given = {key.replace("__", "."): value for key, value in settings.items()}
        return read_recipe(
            "dpo", str(preference_recipe), shortcuts=given, overrides=words, out=tmp_path / name
        )

    return make


@pytest.fixture
def prefer(dpo_recipe: Recipes) -> Runs:
    """Return a function that runs a recipe to its end, ``train__max_steps=5`` for ``train.max_steps``."""

    def run(name: str = "run", **settings: Any) -> Result:
        return run_stage(dpo_recipe(name, **settings), Console(quiet=True), command="a test")

    return run
