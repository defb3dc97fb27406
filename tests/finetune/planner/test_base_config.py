"""Configs of known bases equal the published models; unknown bases are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.planner import base_config
from finetune.planner.architecture import Architecture
from finetune.planner.base_config import ARCHITECTURES, load_base_config
from finetune.recipe import yaml_file
from finetune.recipe.bases import load_bases
from finetune.recipe.errors import UserError

TABLE: dict[str, Any] = yaml_file.read_yaml(ARCHITECTURES)[0]
CODE_NOTE = "buffers of the first versions of GPT-NeoX's code are in the files, and no parameters"


def test_every_hub_base_is_in_the_table() -> None:
    assert list(TABLE) == [name for name in load_bases() if name != "tiny"]


@pytest.mark.parametrize("name", TABLE)
def test_transformers_class_has_the_published_parameter_count(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(TABLE[name]["config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == TABLE[name]["total"]


@pytest.mark.parametrize("name", TABLE)
def test_planner_counts_the_published_parameters(name: str) -> None:
    assert Architecture.from_config(load_base_config(name)).parameters == TABLE[name]["total"]


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("polyglot")])
def test_list_of_bases_has_the_same_parameter_count(name: str) -> None:
    size_text = load_bases()[name].parameters
    listed = float(size_text[:-1]) * {"M": 1e6, "B": 1e9}[size_text[-1]]
    assert listed == pytest.approx(TABLE[name]["total"], rel=0.02, abs=6e7), CODE_NOTE


def test_folders_and_hub_ids_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    assert load_base_config(str(tmp_path))["hidden_size"] == 8
    assert load_base_config("meta-llama/Llama-2-7b-hf") == TABLE["llama-2-7b"]["config"]
    assert load_base_config("tiny")["hidden_size"] == 256


def test_cached_models_are_read_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "qwen3"}))
    requests: list[Any] = []
    monkeypatch.setattr(
        base_config,
        "try_to_load_from_cache",
        lambda *words, **more: requests.append((words, more)) or str(file),
    )
    assert load_base_config("Qwen/Other", "v2") == {"model_type": "qwen3"}
    assert requests == [(("Qwen/Other", "config.json"), {"revision": "v2"})]


def test_unknown_models_are_refused_with_a_repair() -> None:
    with pytest.raises(UserError) as caught:
        load_base_config("owner/unheard-of")
    [problem] = caught.value.problems
    assert problem.where == "model.base" and "'owner/unheard-of'" in problem.actual
    assert problem.repair.startswith("hf download owner/unheard-of config.json")


def test_damaged_configs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        load_base_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        load_base_config(str(tmp_path))
