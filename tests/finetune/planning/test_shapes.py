"""Configs of known bases equal the published models; unknown bases are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.planning import shapes
from finetune.planning.architecture import Architecture
from finetune.planning.shapes import ARCHITECTURES, base_config
from finetune.recipe import yaml_file
from finetune.recipe.bases import bases
from finetune.recipe.errors import UserError

TABLE: dict[str, Any] = yaml_file.read(ARCHITECTURES)[0]
CODE = "buffers of the first versions of GPT-NeoX's code are in the files, and no parameters"


def test_every_base_of_the_hub_is_in_the_table() -> None:
    assert list(TABLE) == [name for name in bases() if name != "tiny"]


@pytest.mark.parametrize("name", TABLE)
def test_the_real_class_has_the_published_number_of_parameters(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(TABLE[name]["config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == TABLE[name]["total"]


@pytest.mark.parametrize("name", TABLE)
def test_the_planner_counts_as_many(name: str) -> None:
    assert Architecture.of(base_config(name)).parameters == TABLE[name]["total"]


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("polyglot")])
def test_the_list_of_bases_says_the_same_in_words(name: str) -> None:
    words = bases()[name].parameters
    told = float(words[:-1]) * {"M": 1e6, "B": 1e9}[words[-1]]
    assert told == pytest.approx(TABLE[name]["total"], rel=0.02, abs=6e7), CODE


def test_a_folder_and_a_hub_id_are_known_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    assert base_config(str(tmp_path))["hidden_size"] == 8
    assert base_config("meta-llama/Llama-2-7b-hf") == TABLE["llama-2-7b"]["config"]
    assert base_config("tiny")["hidden_size"] == 256


def test_a_model_in_the_hub_s_cache_is_read_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "qwen3"}))
    asked: list[Any] = []
    monkeypatch.setattr(
        shapes, "try_to_load_from_cache", lambda *words, **more: asked.append((words, more)) or str(file)
    )
    assert base_config("Qwen/Other", "v2") == {"model_type": "qwen3"}
    assert asked == [(("Qwen/Other", "config.json"), {"revision": "v2"})]


def test_an_unknown_model_is_told_with_the_way_to_know_it() -> None:
    with pytest.raises(UserError) as caught:
        base_config("owner/unheard-of")
    [problem] = caught.value.problems
    assert problem.where == "model.base" and "'owner/unheard-of'" in problem.found
    assert problem.repair.startswith("hf download owner/unheard-of config.json")


def test_a_damaged_config_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        base_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        base_config(str(tmp_path))
