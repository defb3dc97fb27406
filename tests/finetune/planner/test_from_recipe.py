"""Planner inputs from recipes, compared with the models built from the same settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.planner.from_recipe import (
    base_workload,
    load_architecture,
    planned_adapter,
)
from finetune.planner.parameter_count import count_trainable_parameters
from finetune.recipe.discovery import ADAPTERS, plugin_names
from finetune.recipe.recipe import adapter_settings
from finetune.recipe.settings import ModelSettings, RopeSettings, StageSettings, TrainSettings

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


def test_base_workload_of_a_recipe() -> None:
    train = TrainSettings(optimizer="paged_adamw", gradient_checkpointing=True)
    settings = StageSettings(
        adapter=settings_of("lora", dropout=0.0),
        train=train,
        model=ModelSettings(base="llama-2-7b", attention="flash_attention_2"),
    )
    architecture = load_architecture(settings.model)
    step = base_workload(settings, architecture, precision="bfloat16", quantization="nf4", device="cuda")
    assert (step.optimizer, step.checkpointing, step.attention) == ("paged_adamw", True, "flash_attention_2")
    assert (step.quantization, step.adapter.dropout, step.adapter.targets) == ("nf4", False, ())
