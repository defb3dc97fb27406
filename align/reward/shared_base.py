"""Weight sharing: several models on one frozen base, each with its own modules, all with the same weights.

PEFT can hold several adapters on one model and switch between them, but switching between a forward pass and
its backward pass (where gradient checkpointing recomputes) silently drops an adapter's gradient. Here nothing
is switched: a copy of the modules costs kilobytes, and its parameters are the base's, 4-bit ones included.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from align.reward.model import ScoreHead
from finetune.library_internals import QUANTIZATION_ATTRIBUTES, quant_state
from finetune.training.model import SCORE_HEAD, configure_score_heads


def copy_sharing_weights(module: nn.Module) -> nn.Module:
    """Copy a module without its parameters and buffers, which both share.

    Hooks and wrappers added to one of the two later do not affect the other.
    """
    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    quant_states = [state for tensor in tensors if (state := quant_state(tensor)) is not None]
    # deepcopy takes what is in its memo as the copy: weights and quantization states stay shared.
    memo = {id(shared): shared for shared in [*tensors, *quant_states]}
    return copy.deepcopy(module, memo)


def scorer_sharing_base(base: PreTrainedModel, heads: Sequence[str], *, pad_id: int) -> PreTrainedModel:
    """Return a sequence classification model that shares a causal model's backbone; its head is zero.

    Args:
        base: a causal model without an adapter; adapters added to it later do not affect the result.
        heads: names of the heads.
        pad_id: a token that never ends a text.
    """
    # A copy: the policy must not get the head's labels and padding token.
    config = copy.deepcopy(base.config)
    configure_score_heads(config, heads)
    config.get_text_config().pad_token_id = config.pad_token_id = pad_id
    # On the meta device: the backbone is replaced at once, so its weights need no memory.
    with torch.device("meta"):
        scorer: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    prefix = base.base_model_prefix
    backbone = copy_sharing_weights(base.get_submodule(prefix))
    assert type(backbone) is type(scorer.get_submodule(prefix)), (
        "the sequence classification model has another backbone class"
    )
    scorer.set_submodule(prefix, backbone)
    # from_config sets none of them.
    for name in QUANTIZATION_ATTRIBUTES:
        if hasattr(base, name):
            setattr(scorer, name, getattr(base, name))
    original: nn.Linear = scorer.get_submodule(SCORE_HEAD)
    head = ScoreHead(original.in_features, len(heads), bias=False, device=base.device)
    nn.init.zeros_(head.weight)
    scorer.set_submodule(SCORE_HEAD, head)
    scorer.requires_grad_(False)
    return scorer


def base_for_scorers(base: PreTrainedModel, *, changes_base: bool) -> PreTrainedModel:
    """Return the base that reward models share with a policy; a copy if the policy's adapter changes it.

    Args:
        base: a causal model without an adapter.
        changes_base: whether building the adapter changes the frozen weights (``Traits.changes_base``).
    """
    return copy.deepcopy(base) if changes_base else base


def untie_trained_weights(module: nn.Module, others: Sequence[nn.Module]) -> None:
    """Untie a module from shared weights that other models train, by giving it frozen copies.

    Otherwise an adapter that trains weights of the base (full fine-tuning, norms) would change every model
    on that base.

    Args:
        module: the module to keep frozen.
        others: models on the same base, with their adapters.
    """
    trained_ids = {id(param) for other in others for param in other.parameters() if param.requires_grad}
    copies: dict[int, nn.Parameter] = {}
    # With duplicates: a tied weight has several names, and each must get the same copy.
    for name, param in list(module.named_parameters(remove_duplicate=False)):
        if id(param) in trained_ids:
            copied_param = copies.setdefault(
                id(param), nn.Parameter(param.detach().clone(), requires_grad=False)
            )
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent).register_parameter(leaf, copied_param)
