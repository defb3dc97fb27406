"""Private attributes of the pinned libraries, each behind a function with the version it was checked on.

Everything else in the project uses public interfaces. A test of the same name fails when an upgrade changes
one of these. The hooks that PEFT's tuners must override are in ``finetune/adapters/_wrapping.py``.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

QUANTIZATION_ATTRIBUTES = (
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_quantized",
    "quantization_method",
    "hf_quantizer",
)
"""Attributes that transformers sets on quantized models, and that PEFT reads (transformers 5.23, peft 0.21.2:
``tuners/lora/model.py`` chooses the adapter layers by them)."""


def attention_implementation(config: "PretrainedConfig") -> str | None:
    """Return the attention implementation of a config; None before a model is loaded.

    transformers 5.23, ``configuration_utils.py``: the public ``attn_implementation`` is an argument only.
    """
    name: str | None = config._attn_implementation
    return name


def has_recurrent_state(architecture: "type[PreTrainedModel]") -> bool:
    """Return whether an architecture keeps a recurrent state (Mamba and others).

    transformers 5.23, ``modeling_utils.py``: a private class flag, read by ``generate`` too.
    """
    return bool(architecture._is_stateful)


def disable_attention_dropout(module: nn.Module) -> float:
    """Set the dropout of an attention module to 0, and return what it was; 0.0 for other modules.

    transformers 5.23: attention modules hold it as a plain number, ``attention_dropout``, which they read in
    every forward pass in training mode. A module has no method to change it, and ``eval()`` would change
    other layers too. BLOOM's attention has an ``nn.Dropout`` of this name, which is left alone.
    """
    dropout = getattr(module, "attention_dropout", None)
    if not isinstance(dropout, float):
        return 0.0
    module.attention_dropout = 0.0  # type: ignore[assignment]  # a number, no submodule
    return dropout


def quant_state(tensor: Tensor) -> Any | None:
    """Return the quantization state of a 4-bit weight, None for others.

    bitsandbytes 0.50.2, ``nn/modules.py``: ``Params4bit.quant_state``; its ``shape`` is that of the weight
    before two values were packed into a byte.
    """
    return getattr(tensor, "quant_state", None)


def is_zero3_param(param: Tensor) -> bool:
    """Return whether DeepSpeed has partitioned a parameter.

    deepspeed 0.19.8, ``runtime/zero/partition_parameters.py``: ``ds_id``.
    """
    return getattr(param, "ds_id", None) is not None


def zero3_full_shape(param: Tensor) -> torch.Size:
    """Return the full shape of a parameter, whose own data is empty under ZeRO-3 (``ds_shape``)."""
    shape: torch.Size = getattr(param, "ds_shape", param.shape)
    return shape


def zero3_shard(param: Tensor) -> Tensor:
    """Return this rank's shard of a partitioned parameter (``ds_tensor``)."""
    shard: Tensor = param.ds_tensor  # type: ignore[attr-defined]
    return shard
