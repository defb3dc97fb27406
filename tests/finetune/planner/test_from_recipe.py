"""Configs of known bases equal the published models; planner inputs from recipes equal the built models."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.planner.architecture import Architecture
from finetune.planner.from_recipe import load_architecture, planned_adapter, recipe_workload
from finetune.planner.parameter_count import count_trainable_parameters
from finetune.recipe import base_config, yaml_file
from finetune.recipe.base_config import ARCHITECTURES, load_base_config
from finetune.recipe.bases import load_bases
from finetune.recipe.discovery import ADAPTERS, adapter_settings, plugin_names
from finetune.recipe.errors import UserError
from finetune.recipe.settings import ModelSettings, RopeSettings, StageSettings, TrainSettings

TABLE: dict[str, Any] = yaml_file.read_yaml(ARCHITECTURES)[0]
CODE_NOTE = "buffers of the first versions of GPT-NeoX's code are in the files, and no parameters"
BASES_WITH_BIASES = {"bitfit": "polyglot-ko-1.3b"}
"""A base with biases for what trains them."""


def settings_of(method: str, **values: Any) -> Any:
    return adapter_settings(method).model_validate({"method": method, **values})


@pytest.mark.parametrize("method", plugin_names(ADAPTERS))
def test_every_adapter_has_a_parameter_count(method: str) -> None:
    base = BASES_WITH_BIASES.get(method, "llama-2-7b")
    adapter = planned_adapter(settings_of(method))
    assert adapter.method == method
    assert count_trainable_parameters(load_architecture(ModelSettings(base=base)), adapter) > 0


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("lora", {"rank": 4}),
        ("lora", {"rank": 4, "target": ["q_proj", "v_proj"]}),
        ("adalora", {"rank": 5}),
        ("dora", {"rank": 2}),
        ("prefix", {"virtual_tokens": 7}),
        ("prefix", {"virtual_tokens": 7, "projection": True}),
        ("prompt", {"virtual_tokens": 9}),
        ("ptuning", {"encoder": "mlp", "encoder_hidden_size": 32}),
        ("bottleneck", {"placement": "houlsby", "bottleneck_size": 8}),
        ("adamix", {"bottleneck_size": 4, "experts": 3}),
        ("llama_adapter", {"virtual_tokens": 3, "layers": 1}),
        ("ia3", {}),
        ("vera", {"rank": 8}),
        ("layernorm", {}),
        ("full", {}),
    ],
)
def test_counts_equal_the_built_model(method: str, values: dict[str, Any], base_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from finetune.training.model import attach_adapter, count_parameters

    settings = settings_of(method, **values)
    model = AutoModelForCausalLM.from_pretrained(str(base_folder)).requires_grad_(False)
    counts = count_parameters(attach_adapter(model, settings))
    architecture = load_architecture(ModelSettings(base=str(base_folder)))
    assert count_trainable_parameters(architecture, planned_adapter(settings)) == counts.trained


def test_rope_scaling_extends_max_positions(tmp_path: Path, base_folder: Path) -> None:
    rope = RopeSettings(method="yarn", factor=4.0)
    assert load_architecture(ModelSettings(base=str(base_folder))).max_positions == 256
    assert load_architecture(ModelSettings(base=str(base_folder), rope=rope)).max_positions == 1024
    text = json.loads((base_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": {**text, "head_dim": 16}, "vision_config": {}})
    )
    assert load_architecture(ModelSettings(base=str(tmp_path), rope=rope)).max_positions == 1024


def test_workload_of_a_recipe() -> None:
    train = TrainSettings(optimizer="paged_adamw", gradient_checkpointing=True)
    settings = StageSettings(
        adapter=settings_of("lora", dropout=0.0),
        train=train,
        model=ModelSettings(base="llama-2-7b", attention="flash_attention_2"),
    )
    step = recipe_workload(settings, precision="bfloat16", quantization="nf4", device="cuda")
    assert (step.optimizer, step.checkpointing, step.attention) == ("paged_adamw", True, "flash_attention_2")
    assert (step.quantization, step.adapter.dropout, step.adapter.targets) == ("nf4", False, ())


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
