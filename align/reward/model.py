"""Reward model: base with a linear score head, read at the last token of each completion."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from align.preference.attention import block_attention
from align.reward.settings import Settings
from finetune.data.tokens import Encoder
from finetune.distributed.hardware import Hardware
from finetune.distributed.sharding import gathered_params, is_sharded
from finetune.recipe.discovery import adapter_traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import ModelSettings
from finetune.training import auto_values
from finetune.training.context import RunContext
from finetune.training.loading import (
    enable_sharded_inference,
    init_distributed,
    parent_adapter_run,
    resolve_quantization,
    shard_on_load,
)
from finetune.training.model import SCORE_HEAD, Policy, attach_adapter, load_base, load_config, unwrap_model
from finetune.training.resume_adapter import load_adapter_weights


class ScoreHead(nn.Linear):
    """A score head that computes in float32 whatever the base's dtype: score differences are small."""

    def forward(self, states: Tensor) -> Tensor:
        """Return scores (..., heads) for hidden states (..., D)."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.weight.float())


def load_reward_model_for_training(ctx: RunContext[Settings], encoder: Encoder) -> Policy:
    """Load the base with a score head and an adapter: new ones, or those of ``model.init_from``.

    With ``model.init_from`` the reward model is initialized from the SFT model (InstructGPT, arXiv
    2203.02155, section 3.5), or from an earlier reward model with its head. New weights depend on the seed.

    Raises:
        UserError: the base cannot be loaded or has no sequence classification model, or the adapter does not
            fit it.
    """
    settings = ctx.settings
    seed = settings.train.seed
    traits = adapter_traits(settings.adapter.method)
    init_distributed(ctx)
    precision = ctx.resolve_auto(
        "model.precision", auto_values.precision(settings.model.precision, ctx.hardware)
    )
    quantization = ctx.resolve_auto(
        "model.quantization", resolve_quantization(settings.model, traits.quantization)
    )
    # Weights that are trained directly stay in float32; autocast computes in the chosen precision.
    dtype = "float32" if traits.full_finetuning else precision
    with ctx.timed("load"):
        set_seed(seed)
        shard_on_load(ctx, dtype)
        base = load_scorer(
            settings.model,
            settings.reward.heads,
            precision=dtype,
            quantization=quantization,
            hardware=ctx.hardware,
            pad_id=non_stop_pad_id(encoder.tokenizer, encoder.stop_ids),
            strategy=ctx.strategy,
        )
        init_score_head(base, seed=seed)
        model = attach_adapter(base, settings.adapter)
        if parent := parent_adapter_run(settings.model):
            load_adapter_weights(model, parent, new_modules=(SCORE_HEAD,))
    # Embeddings are frozen: without this, checkpointed blocks would get no input that requires a gradient.
    if settings.train.gradient_checkpointing:
        base.enable_input_require_grads()
    enable_sharded_inference(ctx, model, base)
    return Policy(model, precision, quantization)


def non_stop_pad_id(tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> int:
    """Return a padding token that never ends a text: not one of ``stop_ids``."""
    # transformers reads the score at the last token that is not padding. If the pad token is EOS, as in many
    # chat models, that would be one token too early.
    preferred = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    fallbacks = [*sorted(tokenizer.get_added_vocab().values()), *range(len(tokenizer))]
    candidates = (int(token) for token in [*preferred, *fallbacks] if token is not None)
    return next(token for token in candidates if token not in stop_ids)


def load_scorer(
    settings: ModelSettings,
    heads: Sequence[str],
    *,
    precision: str,
    quantization: str,
    hardware: Hardware,
    pad_id: int,
    strategy: str = "single",
) -> PreTrainedModel:
    """Load the frozen base with a score head: the checkpoint's, or an untrained one (``init_score_head``).

    Args:
        settings: the recipe's model section.
        heads: names of the heads.
        precision: compute dtype of the base; the head is float32.
        quantization: quantization of the base; the head is never quantized.
        hardware: target device.
        pad_id: a token that never ends a text: transformers reads the score at the last non-padding token.
        strategy: distributed strategy of the base.

    Raises:
        UserError: unknown base, or transformers has no sequence classification model of its architecture.
    """
    check_scoring_architecture(settings)
    base = load_base(
        settings,
        precision=precision,
        quantization=quantization,
        hardware=hardware,
        heads=heads,
        strategy=strategy,
    )
    replace_score_head(base, len(heads), pad_id=pad_id)
    return base


def replace_score_head(base: PreTrainedModel, heads: int, *, pad_id: int) -> None:
    """Replace the model's score head with a frozen ``ScoreHead`` of the same weights."""
    # transformers reads it in the text config, which a multimodal config holds as an object of its own.
    base.config.get_text_config().pad_token_id = base.config.pad_token_id = pad_id
    original: nn.Linear = base.get_submodule(SCORE_HEAD)
    head = ScoreHead(original.in_features, heads, bias=False, device=original.weight.device)
    with torch.no_grad(), gathered_params(original.get_parameter("weight")) as (weight,):
        head.weight.copy_(weight)
    head.requires_grad_(False)
    base.set_submodule(SCORE_HEAD, head)


def check_scoring_architecture(settings: ModelSettings) -> None:
    """Raise UserError if transformers has no sequence classification model for the base's config."""
    config = load_config(settings)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        actual = (
            f"'{settings.base}' is of type '{config.model_type}', which has no sequence classification model"
        )
        expected = "a type that AutoModelForSequenceClassification supports (Llama, Qwen, GPT-NeoX, ...)"
        raise UserError(Problem("model.base", actual, expected))


def init_score_head(model: PreTrainedModel, *, seed: int) -> None:
    """Initialize the head from N(0, 1 / (D + 1)), reproducibly on every device.

    Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1; Huang et al. 2024 (arXiv 2403.17031), detail 11.
    """
    head = model.get_submodule(SCORE_HEAD)
    assert isinstance(head, ScoreHead)
    # A CPU generator: CUDA's would give other weights for the same seed.
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(weight)


def find_score_head(model: nn.Module) -> ScoreHead:
    """Return the active score head, through any wrapper."""
    score_heads = [module for module in model.modules() if isinstance(module, ScoreHead)]
    return score_heads[-1]  # PEFT's trainable copy comes after the original, which it keeps


def find_input_embeddings(model: nn.Module) -> nn.Module:
    """Return the input embedding layer, through any wrapper."""
    embeddings: nn.Module = unwrap_model(model).get_input_embeddings()
    return embeddings


def completion_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of each completion at its last token: (C, heads), float32, differentiable.

    Args:
        model: a reward model in any wrapper, also with virtual tokens before the input.
        batch: a ``GroupBatch`` on the model's device.
    """
    row_ids, positions = batch["last_token_index"].T
    return token_scores(model, batch)[row_ids, positions]


def token_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the scores at every position: (B, T, heads), float32, differentiable."""
    one_per_row = "attention_mask" in batch
    input_names = ("input_ids", "attention_mask") if one_per_row else ("input_ids",)
    head_outputs: list[Tensor] = []

    def save_output(module: nn.Module, args: tuple[Any, ...], scores: Tensor) -> None:
        head_outputs.append(scores)

    # transformers pools one position per row; a hook on the head gives the scores at all of them.
    handle = find_score_head(model).register_forward_hook(save_output)
    try:
        with nullcontext() if one_per_row else block_attention(model, batch):
            output = model(**{name: batch[name] for name in input_names}, use_cache=False)
    finally:
        handle.remove()
    assert len(head_outputs) == 1, f"the score head ran {len(head_outputs)} times"
    scores = head_outputs[0][:, -batch["input_ids"].shape[1] :]  # virtual tokens come first
    # ZeRO-3 gathers weights when backward reaches a module's output, so the output must be in the graph.
    if is_sharded(model):
        scores = scores + 0.0 * output.logits.sum()
    return scores
