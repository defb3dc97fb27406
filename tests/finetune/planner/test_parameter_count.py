"""Trainable parameter counts equal those of every adapter as built."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.planner.architecture import Architecture
from finetune.planner.parameter_count import count_trainable_parameters, oft_block_size
from finetune.planner.workload import Adapter
from finetune.recipe.discovery import ADAPTERS, load_plugin, plugin_names
from finetune.recipe.errors import UserError

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 320}
SIZES |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 32},
    "smollm3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "olmo2": {"num_key_value_heads": 2, "pad_token_id": 0},
    "exaone4": {"num_key_value_heads": 2},
    "gpt_neox": {},
}
CASES: list[tuple[dict[str, Any], Adapter]] = [
    ({"method": "full"}, Adapter("full")),
    ({"method": "lora", "rank": 8}, Adapter("lora", rank=8)),
    ({"method": "qlora", "rank": 8}, Adapter("qlora", rank=8)),
    ({"method": "rslora", "rank": 8}, Adapter("rslora", rank=8)),
    ({"method": "lora_plus", "rank": 8}, Adapter("lora_plus", rank=8)),
    ({"method": "pissa", "rank": 8}, Adapter("pissa", rank=8)),
    ({"method": "dora", "rank": 8}, Adapter("dora", rank=8)),
    ({"method": "adalora", "rank": 8}, Adapter("adalora", rank=12)),
    ({"method": "vera", "rank": 8}, Adapter("vera", rank=8)),
    ({"method": "oft", "block_size": 24}, Adapter("oft", block_size=24)),
    ({"method": "ia3"}, Adapter("ia3")),
    ({"method": "layernorm"}, Adapter("layernorm")),
    ({"method": "bitfit"}, Adapter("bitfit")),
    ({"method": "bottleneck", "bottleneck_size": 8}, Adapter("bottleneck", width=8)),
    (
        {"method": "bottleneck", "bottleneck_size": 8, "placement": "houlsby"},
        Adapter("bottleneck", width=8, placement="houlsby"),
    ),
    (
        {"method": "adamix", "bottleneck_size": 8, "experts": 3},
        Adapter("adamix", width=8, experts=3, placement="pfeiffer"),
    ),
    ({"method": "prefix", "virtual_tokens": 5}, Adapter("prefix", virtual_tokens=5)),
    (
        {"method": "prefix", "virtual_tokens": 5, "projection": True},
        Adapter("prefix", virtual_tokens=5, projection=True),
    ),
    ({"method": "ptuning_v2", "virtual_tokens": 5}, Adapter("ptuning_v2", virtual_tokens=5)),
    ({"method": "adaptive_prefix", "virtual_tokens": 5}, Adapter("adaptive_prefix", virtual_tokens=5)),
    ({"method": "prompt", "virtual_tokens": 5}, Adapter("prompt", virtual_tokens=5)),
    ({"method": "progressive_prompt", "virtual_tokens": 5}, Adapter("progressive_prompt", virtual_tokens=5)),
    (
        {"method": "multitask_prompt", "virtual_tokens": 5},
        Adapter("multitask_prompt", virtual_tokens=5, rank=1),
    ),
    (
        {"method": "ptuning", "virtual_tokens": 5, "encoder_hidden_size": 16},
        Adapter("ptuning", virtual_tokens=5, width=16),
    ),
    (
        {"method": "ptuning", "virtual_tokens": 5, "encoder_hidden_size": 16, "encoder": "lstm"},
        Adapter("ptuning", virtual_tokens=5, width=16, encoder="lstm"),
    ),
    (
        {"method": "llama_adapter", "virtual_tokens": 5, "layers": 2},
        Adapter("llama_adapter", virtual_tokens=5, top_layers=2),
    ),
    ({"method": "trainable_tokens", "tokens": [3, 4, 7]}, Adapter("trainable_tokens", tokens=3)),
]
NOT_ON = {
    "bitfit": set(FAMILIES) - {"gpt_neox"},
    "llama_adapter": {"qwen3", "gemma3_text", "gpt_neox", "smollm3", "olmo2", "exaone4"},
}
BUILT_ELSEWHERE = {"loftq"}  # LoRA's shapes; building it reads the base's files


def build_adapter(config: dict[str, Any], settings: dict[str, Any], device: str = "cpu") -> nn.Module:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.requires_grad_(False)
    plugin = load_plugin(ADAPTERS, settings["method"], where="adapter.method")
    adapted: nn.Module = plugin.build(model, plugin.Settings.model_validate(settings))
    return adapted


def count_trained(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_built_adapters(family: str) -> None:
    config = {"model_type": family} | SIZES | FAMILIES[family]
    architecture = Architecture.from_config(config)
    wrong = []
    for settings, adapter in CASES:
        if family in NOT_ON.get(adapter.method, set()):
            with pytest.raises(UserError):
                build_adapter(config, settings)
        elif count_trained(build_adapter(config, settings)) != count_trainable_parameters(
            architecture, adapter
        ):
            wrong.append(settings)
    assert not wrong


def test_every_adapter_is_counted() -> None:
    assert {adapter.method for _, adapter in CASES} | BUILT_ELSEWHERE == set(plugin_names(ADAPTERS))
    architecture = Architecture.from_config({"model_type": "llama"} | SIZES)
    assert count_trainable_parameters(architecture, Adapter("loftq")) == count_trainable_parameters(
        architecture, Adapter("lora")
    )
    with pytest.raises(UserError, match="'novel' has no known size"):
        count_trainable_parameters(architecture, Adapter("novel"))


def test_alpaca_lora_on_7b() -> None:
    """Rank 8 on q and v of Llama-2-7B: 32 layers x 2 x 8 x (4096 + 4096) = 4,194,304."""
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008}
    config |= {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
    adapter = Adapter("lora", rank=8, targets=("q_proj", "v_proj"))
    settings = {"method": "lora", "rank": 8, "target": ["q_proj", "v_proj"]}
    count = count_trainable_parameters(Architecture.from_config(config), adapter)
    assert count == count_trained(build_adapter(config, settings, device="meta")) == 4_194_304


def test_a_score_head_is_trained_with_the_adapter() -> None:
    architecture = Architecture.from_config({"model_type": "llama"} | SIZES)
    plain = count_trainable_parameters(architecture, Adapter("lora", rank=8))
    assert count_trainable_parameters(architecture, Adapter("lora", rank=8), heads=2) == plain + 2 * 64


def test_oft_blocks_divide_the_inputs() -> None:
    assert [oft_block_size(inputs, 32) for inputs in (96, 100, 16, 31)] == [32, 25, 16, 31]
