"""Block-mask support is detected from a model's config, and agrees with the numbers of real models."""

import pytest
import torch
from adapter_properties import CONFIGS, FAMILIES, SIZES
from group_models import error, random_groups, random_model, separate_logps
from transformers import (
    AutoConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoConfig,
    JambaConfig,
    Lfm2MoeConfig,
    Llama4TextConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from align.preference.attention import why_separate
from align.preference.groups import GroupCollator
from align.preference.logps import completion_logps
from finetune.training.head import output_head

REFUSED = [
    (
        MistralConfig(sliding_window=100),
        "attention window of 100 tokens (sliding_window), but the longest row has 500",
    ),
    (Gemma2Config(sliding_window=64), "window of 64 tokens (sliding_window)"),
    (GPTNeoConfig(), "window of 256 tokens (window_size)"),
    (Llama4TextConfig(attention_chunk_size=128), "window of 128 tokens (attention_chunk_size)"),
    (MambaConfig(), "'mamba' has a recurrent state"),
    (JambaConfig(), "'jamba' has a recurrent state"),
    (RecurrentGemmaConfig(), "'recurrent_gemma' has a recurrent state"),
    (Qwen3NextConfig(), "'qwen3_next' has a recurrent state"),
    (Lfm2MoeConfig(), "convolutions"),
    (BloomConfig(), "'bloom' takes no position_ids"),
    (MptConfig(), "'mpt' takes no position_ids"),
    (FalconConfig(alibi=True), "ALiBi"),
    (PretrainedConfig(), "unknown architecture"),
]
TAKEN = ("llama", "qwen2", "qwen3", "gpt_neox", "gpt2", "opt", "phi3", "gemma", "olmo2", "mixtral", "granite")


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=lambda value: type(value).__name__)
def test_refused_with_one_line(config: PretrainedConfig, words: str) -> None:
    reason = why_separate(config, reach=500)
    assert words in reason and "\n" not in reason


@pytest.mark.parametrize("kind", TAKEN)
def test_ordinary_attention_is_taken(kind: str) -> None:
    assert why_separate(AutoConfig.for_model(kind), reach=500) == ""


def test_a_window_counts_from_its_own_length_on() -> None:
    for config in (MistralConfig(sliding_window=100), Gemma2Config(sliding_window=100)):
        assert why_separate(config, reach=100) == "" and why_separate(config, reach=101) != ""
    unused = Qwen2Config(sliding_window=100, use_sliding_window=False)
    assert why_separate(unused, reach=500) == ""


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_implementations_without_a_mask_are_told(name: str) -> None:
    config = AutoConfig.for_model("llama", attn_implementation=name)
    assert (
        why_separate(config, reach=9) == f"attention '{name}' takes no block mask (model.attention=sdpa does)"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_models_are_taken(family: str) -> None:
    for attention in ("sdpa", "eager"):
        assert why_separate(random_model(CONFIGS[family], attention).config, reach=60) == ""


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=14),
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=14),
        AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
        AutoConfig.for_model("opt", **SIZES, ffn_dim=64, word_embed_proj_dim=64, dropout=0.0),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_a_model_that_is_taken_gives_the_numbers_of_separate_passes(config: PretrainedConfig) -> None:
    groups = random_groups([(8, [6, 2, 5]), (3, [4, 1])])
    reach = max(group.reach for group in groups)
    attention = "eager" if config.model_type == "gemma2" else "sdpa"  # soft-capped scores: eager alone
    model = random_model(config, attention)
    assert why_separate(model.config, reach=reach) == "" and reach == 14
    found = completion_logps(model, output_head(model), GroupCollator(0, budget=30)(groups))
    assert error(found, separate_logps(model, groups)) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6),
        BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
        MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_a_model_that_is_refused_gives_them_in_the_separate_layout(config: PretrainedConfig) -> None:
    groups = random_groups([(8, [6, 2, 5]), (3, [4, 1])])
    model = random_model(config, "eager")
    reason = why_separate(model.config, reach=14)
    assert reason
    found = completion_logps(model, output_head(model), GroupCollator(0, separate=bool(reason))(groups))
    assert error(found, separate_logps(model, groups)) < 1e-5
