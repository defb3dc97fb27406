"""Shapes of every family equal those of transformers' class for the same config.json."""

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.planning.architecture import Architecture
from finetune.recipe.errors import UserError

QWEN3 = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
QWEN3 |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
GEMMA3 = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
GEMMA3 |= {"num_hidden_layers": 34, "sliding_window": 1024}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
SIGLIP |= {"image_size": 896, "patch_size": 14, "num_attention_heads": 16, "num_hidden_layers": 27}


def sizes(model_type: str, hidden: int, wide: int, layers: int, *, heads: int, **more: Any) -> dict[str, Any]:
    found = {"model_type": model_type, "hidden_size": hidden, "intermediate_size": wide}
    return found | {"num_hidden_layers": layers, "num_attention_heads": heads} | more


CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "llama-2-7b": (sizes("llama", 4096, 11008, 32, heads=32), 6_738_415_616),
    "llama-2-70b": (sizes("llama", 8192, 28672, 80, heads=64, num_key_value_heads=8), 68_976_648_192),
    "llama-3.1-8b": (
        sizes("llama", 4096, 14336, 32, heads=32, num_key_value_heads=8, vocab_size=128256),
        8_030_261_248,
    ),
    "smollm2-135m": (
        sizes("llama", 576, 1536, 30, heads=9, num_key_value_heads=3, vocab_size=49152)
        | {"tie_word_embeddings": True},
        134_515_008,
    ),
    "mistral-7b": (sizes("mistral", 4096, 14336, 32, heads=32, vocab_size=32768), 7_248_023_552),
    "qwen2-0.5b": (
        sizes("qwen2", 896, 4864, 24, heads=14, num_key_value_heads=2) | {"tie_word_embeddings": True},
        494_032_768,
    ),
    "qwen3-0.6b": (QWEN3 | {"tie_word_embeddings": True}, 596_049_920),
    "gemma-2-2b": ({"model_type": "gemma2"}, 2_614_341_888),
    "gemma-3-1b": (
        sizes("gemma3_text", 1152, 6912, 26, heads=4, num_key_value_heads=1, vocab_size=262144),
        999_885_952,
    ),
    "gemma-3-4b": (
        {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": SIGLIP | {"vision_use_head": False}},
        4_300_079_472,
    ),
    "pythia-1.4b": (sizes("gpt_neox", 2048, 8192, 24, heads=16, vocab_size=50304), 1_414_647_808),
    "polyglot-ko-12.8b": (sizes("gpt_neox", 5120, 20480, 40, heads=40, vocab_size=30080), 12_893_603_840),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_and_shapes_are_those_of_the_real_class(name: str) -> None:
    content, published = CONFIGS[name]
    found = Architecture.of(content)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    assert found.parameters == sum(weight.numel() for weight in model.parameters()) == published
    head = model.get_output_embeddings()
    modules = [(name.rsplit(".", 1)[-1], module) for name, module in model.named_modules()]
    linear = Counter(
        (name, one.in_features, one.out_features, one.bias is not None)
        for name, one in modules
        if isinstance(one, nn.Linear) and one is not head
    )
    assert linear == {
        (one.name, one.inputs, one.outputs, one.bias): one.count for one in found.linear_layers()
    }
    norms = Counter(
        (name, one.weight.numel(), "bias" in dict(one.named_parameters()))
        for name, one in modules
        if type(one).__name__.endswith("Norm")
    )
    assert norms == {(one.name, one.width, one.bias): one.count for one in found.norms()}
    kinds = model.config.get_text_config().to_dict().get("layer_types") or []
    if found.sliding_layers and kinds:
        assert kinds.count("sliding_attention") == found.sliding_layers
    assert found.eager == (model.config._attn_implementation == "eager")


def test_an_unknown_type_is_told_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"type 'mamba2'.*\n.*llama, mistral.*\n.*train.max_steps=3"):
        Architecture.of({"model_type": "mamba2"})


def test_a_config_without_its_sizes_is_told() -> None:
    with pytest.raises(UserError, match=r"type 'llama' without 'num_attention_heads'"):
        Architecture.of({"model_type": "llama", "hidden_size": 64})


def test_planning_imports_no_torch() -> None:
    program = "import sys, finetune.planning.memory; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "numpy"} & set(loaded.stdout.split())
