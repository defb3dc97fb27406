"""Block-mask attention for shared prompts, and the models that cannot take a block mask."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel

from align.preference.groups import Cost, visible

IMPLEMENTATIONS = ("eager", "sdpa")
WHOLE = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types that only read the mask; the last two within their window."""
SPANS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "keep_window_size",
    "local_attention_window_len",
    "attention_chunk_size",
)


@contextmanager
def block_attention(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Run every forward pass inside with the batch's block mask and position ids.

    Virtual tokens come once at the start of a row, as inputs (prompt tuning) or as cached keys (prefix
    tuning); all groups of the row attend to them, and their positions come first.

    Args:
        model: the model that will be called, with only ``input_ids``.
        batch: a ``GroupBatch``.
    """
    # A hook on the decoder runs inside all wrappers: PEFT has added its virtual tokens by then (it can widen
    # only a 2-D mask), and a disabled adapter has added none.
    decoder = _decoder(model)
    calls = 0

    def lay(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal calls
        calls += 1
        embeddings, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        # Prompt tuning has prepended its embeddings, prefix tuning passes its keys and values as a cache.
        written = 0 if embeddings is None else embeddings.shape[1] - batch["input_ids"].shape[1]
        cached = 0 if cache is None else int(cache.get_seq_length())
        seen = _behind(visible(batch["groups"], batch["parts"]), written=written, cached=cached)
        changed = {
            "attention_mask": _as_read(seen.unsqueeze(1), decoder),
            "position_ids": _shifted(batch["position_ids"], written=written, cached=cached),
        }
        return args, kwargs | changed

    handle = decoder.register_forward_pre_hook(lay, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    # Without the mask completions would attend to each other, and no error would show it.
    assert calls, f"{type(decoder).__name__} was not called: the block mask was not used"


def why_separate(config: PretrainedConfig, *, reach: int) -> str:
    """Return the reason why a model cannot take a block mask, in one line; empty if it can.

    Args:
        config: the model's config; its attention implementation is set once the model is loaded.
        max_positions: of the longest prompt with a completion (``Group.max_positions``) and virtual tokens.
    """
    text = config.get_text_config()
    fields = text.to_dict()
    return (
        _implementation(text._attn_implementation)
        or _architecture(config)
        or _layers(fields)
        or _span(fields, reach)
    )


def cost_of(model: nn.Module) -> Cost:
    """Return a model's forward cost per token and token pair: with adapters, without embeddings and head."""
    decoder = _decoder(model)
    linear = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    config = decoder.config.get_text_config()
    # Queries times keys, and weights times values: one multiply-add for each hidden dimension of a layer.
    pair = 2.0 * config.num_hidden_layers * config.hidden_size
    return Cost(token=float(sum(one.in_features * one.out_features for one in linear)), pair=pair)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside all wrappers (PEFT, DDP, FSDP)."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _decoder(model: nn.Module) -> PreTrainedModel:
    decoder: PreTrainedModel = unwrapped(model).get_decoder()
    return decoder


def _behind(seen: Tensor, *, written: int, cached: int) -> Tensor:
    """Prepend virtual tokens that all tokens attend to: as inputs (query and key) or as cached keys only."""
    seen = F.pad(seen, (written + cached, 0), value=True)
    seen = F.pad(seen, (0, 0, written, 0), value=False)
    seen[:, :written, :written] = torch.ones(written, written, dtype=torch.bool, device=seen.device).tril()
    return seen


def _shifted(positions: Tensor, *, written: int, cached: int) -> Tensor:
    virtual = torch.arange(written, device=positions.device).expand(len(positions), -1)
    return torch.cat([virtual, positions + written + cached], dim=1)


def _as_read(seen: Tensor, decoder: PreTrainedModel) -> Tensor:
    """Convert a bool mask to what the attention implementation takes: bool for SDPA, additive for eager."""
    if decoder.config._attn_implementation == "sdpa":
        return seen
    lowest = torch.finfo(decoder.dtype).min
    return torch.zeros(seen.shape, dtype=decoder.dtype, device=seen.device).masked_fill(~seen, lowest)


def _implementation(name: str | None) -> str:
    if name is None or name in IMPLEMENTATIONS:
        return ""
    return f"attention '{name}' takes no block mask (model.attention=sdpa does)"


def _architecture(config: PretrainedConfig) -> str:
    if type(config) not in MODEL_MAPPING:
        return f"unknown architecture '{config.model_type}': it may not take a block mask"
    architecture = MODEL_MAPPING[type(config)]
    accepted = inspect.signature(architecture.forward).parameters
    # A private flag, but it is how transformers marks models with recurrent states.
    if architecture._is_stateful:
        return f"'{config.model_type}' has a recurrent state, which ignores the mask"
    if not {"attention_mask", "position_ids"} <= set(accepted):
        return f"'{config.model_type}' takes no position_ids, but they must restart for each completion"
    return ""


def _layers(fields: Mapping[str, Any]) -> str:
    others = sorted({*(fields.get("layer_types") or [])} - WHOLE)
    if others:
        return f"layers of type {', '.join(others)} take no block mask"
    if fields.get("alibi"):
        return "ALiBi biases by distance in the row, across completions"
    if any("conv" in name for name in fields):
        return "convolutions mix neighboring tokens regardless of the mask"
    return ""


def _span(fields: Mapping[str, Any], reach: int) -> str:
    kinds = set(fields.get("layer_types") or WHOLE)
    if kinds == {"full_attention"}:
        return ""
    # A window longer than every row hides nothing.
    spans = {name: fields[name] for name in SPANS if fields.get(name)}
    name = min(spans, key=lambda name: spans[name], default=None)
    if name is None or reach <= spans[name]:
        return ""
    return f"attention window of {spans[name]} tokens ({name}), but the longest row has {reach}"
