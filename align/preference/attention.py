"""Block-mask attention for shared prompts, and the models that cannot take a block mask."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from align.preference.groups import ForwardCost, block_mask
from finetune.adapters._lora_input import DropoutLinear
from finetune.library_internals import attention_implementation
from finetune.training.architectures import MASKABLE_LAYER_TYPES, mask_unsupported
from finetune.training.model import unwrap_model

MASKABLE_IMPLEMENTATIONS = ("eager", "sdpa")
WINDOW_FIELDS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "keep_window_size",
    "local_attention_window_len",
    "attention_chunk_size",
)


@contextmanager
def block_attention(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Run every forward pass inside the block with the batch's block mask and position ids.

    Virtual tokens come once at the start of a row, as inputs (prompt tuning) or as cached keys (prefix
    tuning); all groups of the row attend to them, and their positions come first.

    Args:
        model: the model that will be called, with only ``input_ids``.
        batch: a ``GroupBatch``.
    """
    # A hook on the decoder runs inside all wrappers: PEFT has added its virtual tokens by then (it can widen
    # only a 2-D mask), and a disabled adapter has added none.
    decoder = _get_decoder(model)
    num_calls = 0

    def add_block_mask(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        nonlocal num_calls
        num_calls += 1
        embeddings, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        # Prompt tuning has prepended its embeddings, prefix tuning passes its keys and values as a cache.
        num_input_virtual = 0 if embeddings is None else embeddings.shape[1] - batch["input_ids"].shape[1]
        num_cached_virtual = 0 if cache is None else int(cache.get_seq_length())
        mask = _prepend_virtual_tokens(
            block_mask(batch["group_ids"], batch["segment_ids"]),
            num_input_virtual=num_input_virtual,
            num_cached_virtual=num_cached_virtual,
        )
        mask_and_positions = {
            "attention_mask": _to_attention_mask(mask.unsqueeze(1), decoder),
            "position_ids": _shift_position_ids(
                batch["position_ids"],
                num_input_virtual=num_input_virtual,
                num_cached_virtual=num_cached_virtual,
            ),
        }
        return args, kwargs | mask_and_positions

    handle = decoder.register_forward_pre_hook(add_block_mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    # Without the mask completions would attend to each other, and no error would show it.
    assert num_calls, f"{type(decoder).__name__} was not called: the block mask was not used"


def block_mask_unsupported(config: PretrainedConfig, *, max_positions: int) -> str:
    """Return the reason why a model cannot take a block mask, in one line; empty if it can.

    Args:
        config: the model's config; its attention implementation is set once the model is loaded.
        max_positions: of the longest prompt with a completion (``Group.max_positions``) and virtual tokens.
    """
    text_config = config.get_text_config()
    fields = text_config.to_dict()
    return (
        _implementation_reason(attention_implementation(text_config))
        or mask_unsupported(config)
        or _window_reason(fields, max_positions)
    )


def forward_cost(model: nn.Module) -> ForwardCost:
    """Return a model's forward cost per token and token pair: with adapters, without embeddings and head."""
    decoder = _get_decoder(model)
    linear_layers = [module for module in decoder.modules() if isinstance(module, (nn.Linear, DropoutLinear))]
    config = decoder.config.get_text_config()
    # Queries times keys, and weights times values: one multiply-add for each hidden dimension of a layer.
    per_pair = 2.0 * config.num_hidden_layers * config.hidden_size
    return ForwardCost(
        per_token=float(sum(layer.in_features * layer.out_features for layer in linear_layers)),
        per_pair=per_pair,
    )


def _get_decoder(model: nn.Module) -> PreTrainedModel:
    base = unwrap_model(model)
    decoder = base.get_decoder()
    # ModernBERT's decoder calls its LM head ``decoder``.
    return decoder if isinstance(decoder, PreTrainedModel) else base.base_model


def _prepend_virtual_tokens(mask: Tensor, *, num_input_virtual: int, num_cached_virtual: int) -> Tensor:
    """Prepend virtual tokens that all tokens attend to: as inputs (query and key) or as cached keys only."""
    # Key columns for all virtual tokens, query rows only for those in the input. Virtual tokens come before
    # every group: they are causal among themselves and attend to nothing else.
    mask = F.pad(mask, (num_input_virtual + num_cached_virtual, 0), value=True)
    mask = F.pad(mask, (0, 0, num_input_virtual, 0), value=False)
    mask[:, :num_input_virtual, :num_input_virtual] = torch.ones(
        num_input_virtual, num_input_virtual, dtype=torch.bool, device=mask.device
    ).tril()
    return mask


def _shift_position_ids(
    position_ids_BT: Tensor, *, num_input_virtual: int, num_cached_virtual: int
) -> Tensor:
    virtual = torch.arange(num_input_virtual, device=position_ids_BT.device).expand(len(position_ids_BT), -1)
    return torch.cat([virtual, position_ids_BT + num_input_virtual + num_cached_virtual], dim=1)


def _to_attention_mask(mask: Tensor, decoder: PreTrainedModel) -> Tensor:
    """Convert a bool mask to what the attention implementation takes: bool for SDPA, additive for eager."""
    if attention_implementation(decoder.config) == "sdpa":
        return mask
    # The lowest finite value, as in transformers' own masks: eager attention adds the mask to its scores.
    lowest = torch.finfo(decoder.dtype).min
    return torch.zeros(mask.shape, dtype=decoder.dtype, device=mask.device).masked_fill(~mask, lowest)


def _implementation_reason(name: str | None) -> str:
    if name is None or name in MASKABLE_IMPLEMENTATIONS:
        return ""
    return f"attention '{name}' does not support a block mask (model.attention=sdpa does)"


def _window_reason(fields: Mapping[str, Any], max_positions: int) -> str:
    layer_types = set(fields.get("layer_types") or MASKABLE_LAYER_TYPES)
    if layer_types == {"full_attention"}:
        return ""
    # A window longer than every row hides nothing.
    windows = {name: fields[name] for name in WINDOW_FIELDS if fields.get(name)}
    name = min(windows, key=lambda name: windows[name], default=None)
    if name is None or max_positions <= windows[name]:
        return ""
    return f"attention window of {windows[name]} tokens ({name}), but the longest row has {max_positions}"
