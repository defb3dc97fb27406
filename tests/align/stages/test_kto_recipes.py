"""The shipped KTO recipes: they load, and every value says where it comes from."""

import re

import pytest

from finetune.recipe.discovery import PROJECT
from finetune.recipe.recipe import load

FILES = sorted((PROJECT / "recipes" / "kto").glob("*.yaml"))


def test_the_recipes_are_there() -> None:
    assert {file.stem for file in FILES} >= {"quickstart", "kto-mix"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_loads_and_every_value_carries_its_source(file) -> None:
    recipe = load("kto", file.stem)
    assert recipe.notes == [] and 20 < len(recipe.description) <= 100
    values = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith(" ")]
    assert len(values) >= 15
    for line in values:
        assert re.match(r"^  \w+: \S.*# .{8,}$", line), f"{file.name}: no source behind {line!r}"


def test_published_numbers() -> None:
    train = load("kto", "kto-mix").settings.train
    assert (train.epochs, train.batch_size, train.schedule, train.warmup) == (1, 16, "cosine", 0.1)
