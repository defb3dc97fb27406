"""A reward model: the base with a linear head that turns a state into scores, read where a text ends."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from align.preference.attention import block_attention
from finetune.planning.hardware import Hardware
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import ModelSettings
from finetune.training.apart import in_parts, whole
from finetune.training.model import SCORE, load_base, load_config


class ScoreHead(nn.Linear):
    """The head in float32, whatever the base computes in: differences of scores are small numbers."""

    def forward(self, states: Tensor) -> Tensor:
        """Return (..., heads) for states (..., width)."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.weight.float())


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
    """Return the frozen base with a head of its files, or with a fresh one (``draw_head``).

    Args:
        settings: the recipe's model section.
        heads: names of the scores.
        precision: type of the base's forward pass; the head is float32.
        quantization: how the base is stored; the head never is.
        hardware: where it goes.
        pad_id: a token that ends no text: the library reads the score at the last token that is another.
        strategy: how processes share the base.

    Raises:
        UserError: no such base, or its architecture has no model that scores.
    """
    refuse_without_scores(settings)
    base = load_base(
        settings,
        precision=precision,
        quantization=quantization,
        hardware=hardware,
        heads=heads,
        strategy=strategy,
    )
    put_head(base, len(heads), pad_id=pad_id)
    return base


def put_head(base: PreTrainedModel, heads: int, *, pad_id: int) -> None:
    """Put our head in the place of a scoring model's own, with its weights; it is frozen."""
    base.config.get_text_config().pad_token_id = base.config.pad_token_id = pad_id
    old: nn.Linear = base.get_submodule(SCORE)
    head = ScoreHead(old.in_features, heads, bias=False, device=old.weight.device)
    with torch.no_grad(), whole(old.get_parameter("weight")) as (weight,):
        head.weight.copy_(weight)
    head.requires_grad_(False)
    base.set_submodule(SCORE, head)


def refuse_without_scores(settings: ModelSettings) -> None:
    """Raise UserError if the library has no scoring model of the base's architecture; no weight is read."""
    config = load_config(settings)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        found = f"'{settings.base}' is of type '{config.model_type}', for which there is no scoring model"
        expected = "a type that AutoModelForSequenceClassification knows (Llama, Qwen, GPT-NeoX, ...)"
        raise UserError(Problem("model.base", found, expected))


def draw_head(model: PreTrainedModel, *, seed: int) -> None:
    """Draw the head's weights from N(0, 1 / (width + 1)), the same for a seed on every device.

    Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1; Huang et al. 2024 (arXiv 2403.17031), detail 11.
    """
    head = model.get_submodule(SCORE)
    assert isinstance(head, ScoreHead)
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=draw) / sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(weight)


def score_head(model: nn.Module) -> ScoreHead:
    """Return the head that the forward pass goes through, in any wrapper."""
    found = [module for module in model.modules() if isinstance(module, ScoreHead)]
    return found[-1]  # PEFT keeps the one that it copied before the copy


def input_embeddings(model: nn.Module) -> nn.Module:
    """Return what turns token ids into vectors, in any wrapper."""
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    found: nn.Module = base.get_input_embeddings()
    return found


def completion_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of each completion, read at its last token, in float32.

    Args:
        model: a reward model in any wrapper; virtual tokens in front of the input are allowed for.
        batch: a ``GroupBatch`` on the model's device.

    Returns:
        (completions, heads), with gradients.
    """
    lines, columns = batch["ends"].T
    return all_scores(model, batch)[lines, columns]


def all_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the head makes of every state, (lines, columns, heads), in float32, with gradients."""
    separate = "attention_mask" in batch
    names = ("input_ids", "attention_mask") if separate else ("input_ids",)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], scores: Tensor) -> None:
        found.append(scores)

    handle = score_head(model).register_forward_hook(keep)
    try:
        with nullcontext() if separate else block_attention(model, batch):
            output = model(**{name: batch[name] for name in names}, use_cache=False)
    finally:
        handle.remove()
    assert len(found) == 1, f"the model went through its head {len(found)} times"
    scores = found[0][:, -batch["input_ids"].shape[1] :]
    if in_parts(model):  # ZeRO-3 fetches weights when the backward pass comes to a module's output
        scores = scores + 0.0 * output.logits.sum()
    return scores
