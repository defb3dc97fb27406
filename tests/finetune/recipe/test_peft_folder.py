"""Adapters of PEFT as parent runs: base and settings from adapter_config.json, refusals, other bases."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from align import load_recipe
from finetune.recipe.errors import UserError
from finetune.recipe.peft_folder import is_peft_folder, peft_adapter_settings, peft_record
from finetune.training.fingerprint import parent_run_record

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["v_proj", "q_proj"],
    "bias": "none",
    "rank_pattern": {},
    "modules_to_save": None,
}


def folder(path: Path, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, 8) for name in names}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1, "target": ["q_proj", "v_proj"]}),
        ({"use_dora": True}, {"method": "dora", "rank": 4}),
        ({"use_rslora": True, "lora_alpha": 16}, {"method": "rslora", "alpha": 16}),
        ({"target_modules": "all-linear"}, {"target": "all-linear"}),
        (
            {"target_modules": ".*proj"},
            {"target": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        ),
        ({"init_lora_weights": "gaussian"}, {"method": "lora"}),
    ],
)
def test_its_own_settings_are_taken(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    found = peft_adapter_settings(folder(tmp_path / "peft", **changes))
    assert {key: found[key] for key in settings} == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3, which llm-align loads and does not train further"),
        ({"modules_to_save": ["lm_head"]}, "a LoRA adapter with modules_to_save"),
        ({"bias": "all"}, "a LoRA adapter with bias=all"),
        ({"rank_pattern": {"q_proj": 8}}, "with rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "with init_lora_weights=pissa_niter_4"),
        ({"use_dora": True, "use_rslora": True}, "use_dora with use_rslora"),
    ],
)
def test_what_is_not_trained_further_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = folder(tmp_path / "peft", **changes)
    with pytest.raises(UserError, match=message) as error:
        load_recipe("quickstart", init_from=path)
    assert f"`llm-align merge {path}`" in str(error.value)


def test_base_and_settings_are_those_of_the_adapter(tmp_path: Path) -> None:
    path = folder(tmp_path / "peft")
    recipe = load_recipe("quickstart", init_from=path)
    adapter: Any = recipe.settings.adapter
    assert (adapter.method, adapter.rank, adapter.target) == ("lora", 4, ["q_proj", "v_proj"])
    assert recipe.settings.model.base == "tiny" and recipe.origins["adapter.rank"] == "adapter peft"
    assert any("does not say with which template it was trained" in note for note in recipe.notes)
    assert any("adapter peft replaces the recipe's adapter.rank=16" in note for note in recipe.notes)
    with pytest.raises(UserError, match="8, but adapter peft has 4"):
        load_recipe("quickstart", init_from=path, settings={"adapter.rank": 8})
    record = parent_run_record(recipe.settings)
    assert record is not None and record["files"] == peft_record(path)["files"]


def test_another_base_is_reported_and_wins(tmp_path: Path) -> None:
    path = folder(tmp_path / "peft", base_model_name_or_path="/home/somebody/llama")
    recipe = load_recipe("quickstart", init_from=path, base="tiny")
    assert recipe.settings.model.base == "tiny"
    assert any("was trained on '/home/somebody/llama' (adapter_config.json)" in note for note in recipe.notes)
    assert not any("adapter_config.json" in note for note in load_recipe(init_from=folder(path)).notes)


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    path = folder(tmp_path / "run")
    assert is_peft_folder(path)
    (path / "run.json").write_text("{}")
    assert not is_peft_folder(path) and not is_peft_folder(folder(path / "adapter")), "of a run"
    bare = folder(tmp_path / "bare", base_model_name_or_path=None)
    with pytest.raises(UserError, match="names no base model"):
        peft_record(bare)
    (folder(bare) / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors"):
        load_recipe("quickstart", init_from=bare)
    (bare / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe("quickstart", init_from=bare)
