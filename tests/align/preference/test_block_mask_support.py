"""Block-mask support is detected from a model's config, and agrees with the numbers of real models."""

import pytest
import torch
from adapter_properties import CONFIGS, FAMILIES, SIZES
from group_models import logp_error, plain_logps, random_groups, random_model
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

from align.preference.attention import block_mask_unsupported
from align.preference.groups import GroupCollator
from align.preference.logps import token_logps
from finetune.training.loss import output_head

UNSUPPORTED = [
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
    (BloomConfig(), "'bloom' does not accept position_ids"),
    (MptConfig(), "'mpt' does not accept position_ids"),
    (FalconConfig(alibi=True), "ALiBi"),
    (PretrainedConfig(), "unknown architecture"),
]
SUPPORTED = (
    "llama",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "gpt2",
    "opt",
    "phi3",
    "gemma",
    "olmo2",
    "mixtral",
    "granite",
)


@pytest.mark.parametrize(("config", "words"), UNSUPPORTED, ids=lambda value: type(value).__name__)
def test_unsupported_models_have_a_one_line_reason(config: PretrainedConfig, words: str) -> None:
    reason = block_mask_unsupported(config, max_positions=500)
    assert words in reason and "\n" not in reason


@pytest.mark.parametrize("kind", SUPPORTED)
def test_ordinary_attention_is_supported(kind: str) -> None:
    assert block_mask_unsupported(AutoConfig.for_model(kind), max_positions=500) == ""


def test_window_matters_beyond_its_length() -> None:
    for config in (MistralConfig(sliding_window=100), Gemma2Config(sliding_window=100)):
        assert (
            block_mask_unsupported(config, max_positions=100) == ""
            and block_mask_unsupported(config, max_positions=101) != ""
        )
    unused = Qwen2Config(sliding_window=100, use_sliding_window=False)
    assert block_mask_unsupported(unused, max_positions=500) == ""


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_implementations_without_a_mask_are_unsupported(name: str) -> None:
    config = AutoConfig.for_model("llama", attn_implementation=name)
    assert (
        block_mask_unsupported(config, max_positions=9)
        == f"attention '{name}' does not support a block mask (model.attention=sdpa does)"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_models_are_supported(family: str) -> None:
    for attention in ("sdpa", "eager"):
        assert block_mask_unsupported(random_model(CONFIGS[family], attention).config, max_positions=60) == ""


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
def test_supported_models_match_one_pass_per_completion(config: PretrainedConfig) -> None:
    groups = random_groups([(8, [6, 2, 5]), (3, [4, 1])])
    max_positions = max(group.max_positions for group in groups)
    attention = "eager" if config.model_type == "gemma2" else "sdpa"  # soft-capped scores: eager alone
    model = random_model(config, attention)
    assert block_mask_unsupported(model.config, max_positions=max_positions) == "" and max_positions == 14
    logps = token_logps(model, output_head(model), GroupCollator(0, budget=30)(groups)).sum(1)
    assert logp_error(logps, plain_logps(model, groups)) < 1e-5


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
def test_unsupported_models_match_with_one_completion_per_row(config: PretrainedConfig) -> None:
    groups = random_groups([(8, [6, 2, 5]), (3, [4, 1])])
    model = random_model(config, "eager")
    reason = block_mask_unsupported(model.config, max_positions=14)
    assert reason
    logps = token_logps(model, output_head(model), GroupCollator(0, one_per_row=bool(reason))(groups)).sum(1)
    assert logp_error(logps, plain_logps(model, groups)) < 1e-5
