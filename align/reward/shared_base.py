"""Several models on one frozen base: each has modules of its own, and all have the same weights in memory.

PEFT can put several adapters on one model and switch between them; then whatever runs between a forward pass
and its backward pass (gradient checkpointing recomputes in between) must not switch, or an adapter silently
gets no gradient. Here nothing is switched: a copy of the modules costs kilobytes, and its parameters are the
base's own, 4-bit ones included.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from align.reward.model import ScoreHead
from finetune.training.model import SCORE, label_scores

STORED = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer")
"""What a model says of how its weights are stored; adapters ask for it."""


def same_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters and buffers are those of the module itself.

    Hooks and wrappers that are put on one of the two are not on the other.
    """
    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    states = [tensor.quant_state for tensor in tensors if "quant_state" in vars(tensor)]
    memo = {id(one): one for one in [*tensors, *states]}
    return copy.deepcopy(module, memo)


def scorer_on(base: PreTrainedModel, heads: Sequence[str], *, pad_id: int) -> PreTrainedModel:
    """Return a scoring model with the weights of a causal model that has no adapter yet, and zeros as head.

    Args:
        base: a causal model; the result shares its backbone's weights, and stays as it is when an adapter is
            put on the base.
        heads: names of the scores.
        pad_id: a token that ends no text.
    """
    config = copy.deepcopy(base.config)
    label_scores(config, heads)
    config.get_text_config().pad_token_id = config.pad_token_id = pad_id
    with torch.device("meta"):
        scorer: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    prefix = base.base_model_prefix
    backbone = same_weights(base.get_submodule(prefix))
    assert type(backbone) is type(scorer.get_submodule(prefix)), "the library scores with another backbone"
    scorer.set_submodule(prefix, backbone)
    vars(scorer).update({name: value for name, value in vars(base).items() if name in STORED})
    old: nn.Linear = scorer.get_submodule(SCORE)
    head = ScoreHead(old.in_features, len(heads), bias=False, device=base.device)
    nn.init.zeros_(head.weight)
    scorer.set_submodule(SCORE, head)
    scorer.requires_grad_(False)
    return scorer


def base_for_scorers(base: PreTrainedModel, *, rewritten: bool) -> PreTrainedModel:
    """Return the base that scorers share with a policy: a copy of it where the policy's adapter rewrites it.

    Args:
        base: a causal model that has no adapter yet.
        rewritten: whether building the adapter changes the frozen weights (``Traits.changes_base``).
    """
    return copy.deepcopy(base) if rewritten else base


def own_weights(module: nn.Module, others: Sequence[nn.Module]) -> None:
    """Give a module copies of the weights that it shares with others which train them.

    An adapter that trains weights of the base itself (full tuning, norms) would otherwise carry every other
    model on that base along.

    Args:
        module: it stays as it is, frozen.
        others: models on the same base, with their adapters.
    """
    trained = {id(weight) for other in others for weight in other.parameters() if weight.requires_grad}
    copies: dict[int, nn.Parameter] = {}
    for name, weight in list(module.named_parameters(remove_duplicate=False)):
        if id(weight) in trained:
            copied = copies.setdefault(id(weight), nn.Parameter(weight.detach().clone(), requires_grad=False))
            place, _, own = name.rpartition(".")
            module.get_submodule(place).register_parameter(own, copied)
