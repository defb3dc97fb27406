"""Shapes of every family equal those of transformers' class for the same config.json."""

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.planner.architecture import Architecture
from finetune.recipe.errors import UserError

QWEN3 = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
QWEN3 |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
GEMMA3 = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
GEMMA3 |= {"num_hidden_layers": 34, "sliding_window": 1024}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
SIGLIP |= {"image_size": 896, "patch_size": 14, "num_attention_heads": 16, "num_hidden_layers": 27}


def config_sizes(
    model_type: str, hidden: int, intermediate: int, layers: int, *, heads: int, **options: Any
) -> dict[str, Any]:
    config = {"model_type": model_type, "hidden_size": hidden, "intermediate_size": intermediate}
    return config | {"num_hidden_layers": layers, "num_attention_heads": heads} | options


CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "llama-2-7b": (config_sizes("llama", 4096, 11008, 32, heads=32), 6_738_415_616),
    "llama-2-70b": (config_sizes("llama", 8192, 28672, 80, heads=64, num_key_value_heads=8), 68_976_648_192),
    "llama-3.1-8b": (
        config_sizes("llama", 4096, 14336, 32, heads=32, num_key_value_heads=8, vocab_size=128256),
        8_030_261_248,
    ),
    "smollm2-135m": (
        config_sizes("llama", 576, 1536, 30, heads=9, num_key_value_heads=3, vocab_size=49152)
        | {"tie_word_embeddings": True},
        134_515_008,
    ),
    "mistral-7b": (config_sizes("mistral", 4096, 14336, 32, heads=32, vocab_size=32768), 7_248_023_552),
    "qwen2-0.5b": (
        config_sizes("qwen2", 896, 4864, 24, heads=14, num_key_value_heads=2) | {"tie_word_embeddings": True},
        494_032_768,
    ),
    "qwen3-0.6b": (QWEN3 | {"tie_word_embeddings": True}, 596_049_920),
    "gemma-2-2b": ({"model_type": "gemma2"}, 2_614_341_888),
    "gemma-3-1b": (
        config_sizes("gemma3_text", 1152, 6912, 26, heads=4, num_key_value_heads=1, vocab_size=262144),
        999_885_952,
    ),
    "gemma-3-4b": (
        {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": SIGLIP | {"vision_use_head": False}},
        4_300_079_472,
    ),
    "pythia-1.4b": (config_sizes("gpt_neox", 2048, 8192, 24, heads=16, vocab_size=50304), 1_414_647_808),
    "polyglot-ko-12.8b": (
        config_sizes("gpt_neox", 5120, 20480, 40, heads=40, vocab_size=30080),
        12_893_603_840,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_and_shapes_match_transformers(name: str) -> None:
    content, published = CONFIGS[name]
    architecture = Architecture.from_config(content)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    assert architecture.parameters == sum(weight.numel() for weight in model.parameters()) == published
    head = model.get_output_embeddings()
    modules = [(name.rsplit(".", 1)[-1], module) for name, module in model.named_modules()]
    linear = Counter(
        (name, shape.in_features, shape.out_features, shape.bias is not None)
        for name, shape in modules
        if isinstance(shape, nn.Linear) and shape is not head
    )
    assert linear == {
        (shape.name, shape.in_features, shape.out_features, shape.bias): shape.count
        for shape in architecture.linear_layers()
    }
    norms = Counter(
        (name, shape.weight.numel(), "bias" in dict(shape.named_parameters()))
        for name, shape in modules
        if type(shape).__name__.endswith("Norm")
    )
    assert norms == {(shape.name, shape.width, shape.bias): shape.count for shape in architecture.norms()}
    kinds = model.config.get_text_config().to_dict().get("layer_types") or []
    if architecture.sliding_layers and kinds:
        assert kinds.count("sliding_attention") == architecture.sliding_layers
    assert architecture.eager == (model.config._attn_implementation == "eager")


def test_unknown_types_are_refused_with_a_repair() -> None:
    with pytest.raises(UserError, match=r"type 'mamba2'.*\n.*llama, .*mistral.*\n.*train.max_steps=3"):
        Architecture.from_config({"model_type": "mamba2"})


def test_incomplete_configs_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        Architecture.from_config({"model_type": "llama", "hidden_size": 64})
    missing = [problem.actual for problem in caught.value.problems]
    assert missing[0] == "config.json: num_attention_heads is missing" and len(missing) == 3


@pytest.mark.parametrize("value", ["2048", "", -1, 0, 2.5, 2048.0, True, [2048, 2048], {}, 10**12])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "head_dim",
        "sliding_window",
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_invalid_sizes_are_refused(family: str, key: str, value: Any) -> None:
    sizes = config_sizes("llama", 64, 128, 2, heads=4, num_key_value_heads=2) | {key: value}
    config = sizes if family == "llama" else {"model_type": family, "text_config": sizes}
    with pytest.raises(UserError) as caught:
        Architecture.from_config(config)
    [problem] = caught.value.problems
    section = "" if family == "llama" else "text_config."
    assert problem.actual == f"config.json has {section}{key}={json.dumps(value)}"
    assert problem.expected == "an integer, 1 or more" and problem.repair


@pytest.mark.parametrize(
    ("changes", "actual"),
    [
        ({"hidden_size": None}, "hidden_size is null"),
        ({"hidden_size": 66}, "hidden_size=66"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings="false"'),
        ({"attention_bias": 1}, "attention_bias=1"),
        ({"mlp_bias": None}, "mlp_bias=null"),
        ({"layer_types": ["full_attention"]}, 'layer_types=["full_attention"]'),
        ({"layer_types": "full_attention"}, 'layer_types="full_attention"'),
        ({"model_type": "gemma2", "final_logit_softcapping": "30"}, 'final_logit_softcapping="30"'),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers=-1",
        ),
        ({"model_type": ["llama"]}, "a model of type"),
        ({"model_type": None}, "a model of type"),
        ({"model_type": "gemma3"}, "text_config.hidden_size"),
        ({"model_type": "gemma3", "text_config": [1]}, "text_config=[1]"),
        ({"model_type": "gemma3", "vision_config": "siglip"}, 'vision_config="siglip"'),
        ({"model_type": "gemma3", "vision_config": {"patch_size": 0}}, "vision_config.patch_size=0"),
    ],
)
def test_invalid_values_are_refused(changes: dict[str, Any], actual: str) -> None:
    sizes = config_sizes("llama", 64, 128, 2, heads=4, num_key_value_heads=2)
    config = sizes | {"text_config": {**sizes, "hidden_size": "x"}} | changes
    with pytest.raises(UserError) as caught:
        Architecture.from_config(config)
    assert any(actual in problem.actual for problem in caught.value.problems)


def test_all_mistakes_are_reported_at_once() -> None:
    config = config_sizes("llama", -64, 128, 2, heads=4) | {"vocab_size": "many", "mlp_bias": 2}
    with pytest.raises(UserError) as caught:
        Architecture.from_config(config)
    assert len(caught.value.problems) == 3


def test_layer_types_tell_which_layers_slide() -> None:
    config = config_sizes("qwen3", 64, 128, 3, heads=4, head_dim=16, num_key_value_heads=2)
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    sliding = {"use_sliding_window": True, "sliding_window": 32, "layer_types": kinds}
    assert Architecture.from_config(config | sliding).sliding_layers == 2


def test_planning_imports_no_torch() -> None:
    program = "import sys, finetune.planner.memory; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "numpy"} & set(loaded.stdout.split())
