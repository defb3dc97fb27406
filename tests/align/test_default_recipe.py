"""The default recipe of a stage."""

import json
from pathlib import Path

import pytest

from align.api import load_recipe
from align.default_recipe import default_recipe
from finetune.recipe.discovery import load_stage, recipe_names, stage_names


@pytest.mark.parametrize("given", [{}, {"model.base": "tiny"}, {"model.init_from": "sft/quickstart"}])
def test_the_embedded_base_gets_the_quickstart(given: dict[str, str]) -> None:
    assert default_recipe("dpo", given) == ("quickstart", [])


@pytest.mark.parametrize("stage", stage_names())
def test_another_base_gets_the_stage_s_public_data(stage: str) -> None:
    name, [note] = default_recipe(stage, {"model.base": "llama-2-7b"})
    assert name == load_stage(stage).PUBLIC and name in recipe_names(stage)
    assert name in note


def test_the_base_of_a_parent_run_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for base in ("tiny", "llama-2-7b"):
        record = {
            "format": 2,
            "status": "finished",
            "stage": "sft",
            "recipe": "r",
            "digest": "d",
            "reload": {"model": {"base": base}},
        }
        (tmp_path / base).mkdir()
        (tmp_path / base / "run.json").write_text(json.dumps(record))
    assert default_recipe("dpo", {"model.init_from": "tiny"})[0] == "quickstart"
    assert default_recipe("dpo", {"model.init_from": "llama-2-7b"})[0] == "ultrafeedback"


def test_dpo_with_only_a_base() -> None:
    recipe = load_recipe(stage="dpo", base="llama-2-7b")
    assert recipe.settings.data.source == "HuggingFaceH4/ultrafeedback_binarized"
    assert recipe.settings.model.base == "llama-2-7b" and recipe.notes[0].startswith("no recipe given")
