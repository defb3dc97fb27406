"""A user's folder: a base model with only a config, a data file, and recipes written by the test."""

from pathlib import Path
from textwrap import dedent

import pytest

from finetune.recipe.recipe import Recipe, read_recipe

GOOD = """
stage: sft
description: a recipe of a test
model:
  base: ./base
data:
  source: rows.jsonl
  template: alpaca
adapter:
  method: lora
  rank: 8
  alpha: 16
train:
  learning_rate: 2e-4
  epochs: 3
"""


class RecipeWorkspace:
    """Writes recipes into the current folder and loads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, text: str, name: str = "my.yaml") -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip("\n"), encoding="utf-8")
        return name

    def load(self, text: str = GOOD, *overrides: str, **shortcuts: object) -> Recipe:
        given = {key.replace("__", "."): value for key, value in shortcuts.items()}
        return read_recipe("sft", self.write(text), overrides=overrides, shortcuts=given)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeWorkspace:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name in ("rows.jsonl", "other.jsonl"):
        (tmp_path / name).write_text('{"instruction": "a", "output": "b"}\n')
    return RecipeWorkspace(tmp_path)
