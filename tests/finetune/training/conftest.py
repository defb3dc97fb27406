"""Fixtures: complete runs of the sft stage in a temporary folder."""

from pathlib import Path
from typing import Any

import pytest
from fixture_types import MakeRecipe, Tune
from rich.console import Console

from finetune.recipe.recipe import Recipe, read_recipe
from finetune.training.result import Result
from finetune.training.stage import run_stage

RECIPE = """\
stage: sft
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 6, max_length: 128}}
adapter: {{method: lora, rank: 4, dropout: 0.0}}
train: {{max_steps: 3, batch_size: 8, micro_batch_size: 4, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 2, max_new_tokens: 4}}
"""


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, rows_file: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "sums.yaml"
    path.write_text(RECIPE.format(base=base_folder, rows=rows_file), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(recipe_file: Path, tmp_path: Path) -> MakeRecipe:
    """Return a function from a run's name and settings to a recipe."""

    def make(name: str = "run", **settings: Any) -> Recipe:
        overrides = {key.replace("__", "."): value for key, value in settings.items()}
        return read_recipe("sft", str(recipe_file), shortcuts=overrides, out=tmp_path / name)

    return make


@pytest.fixture
def tune(make_recipe: MakeRecipe) -> Tune:
    """Return a function that runs a recipe; ``train__max_steps=5`` sets ``train.max_steps``."""

    def run(name: str = "run", *, force: bool = False, **settings: Any) -> Result:
        return run_stage(make_recipe(name, **settings), Console(quiet=True), force=force, command="a test")

    return run
