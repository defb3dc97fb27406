"""Internals of the pinned libraries, each behind a function with the version it was checked on.

They are private or undocumented attributes; everything else in the project uses public interfaces. When an
upgrade changes one of them, ``tests/finetune/test_library_internals.py`` fails. The hooks that PEFT's tuners
must override are in ``finetune/adapters/_wrapping.py``.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

CURRENT_PLUGIN = "current"
"""Accelerate's name for the DeepSpeed plugin of a second training in one process."""

QUANTIZATION_ATTRIBUTES = (
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_quantized",
    "quantization_method",
    "hf_quantizer",
)
"""Attributes that transformers sets on quantized models, and that PEFT reads (transformers 5.23, peft 0.21.2:
``tuners/lora/model.py`` chooses the adapter layers by them)."""


def names_moved_to_experts(model_type: str) -> frozenset[str]:
    """Return the names of layers that PEFT's LoRA replaces by the fused experts of a model type.

    peft 0.21.2, ``utils/transformers_weight_conversion.py``: adapters of transformers 4 named the experts'
    layers, which are one tensor now. The table has types that have no experts at all in some configs.
    """
    from peft.utils import transformers_weight_conversion as conversion  # noqa: PLC0415 - imports peft

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def checkpoint_state_dict(model: "PreTrainedModel", state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the names and shapes of the files that ``save_pretrained`` writes.

    transformers 5.23, ``core_model_loading.py``: the experts of a mixture are one tensor in memory, and one
    per expert in the files.
    """
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415 - for saving only

    return dict(revert_weight_conversion(model, state))


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


def recomputes_frequencies(module: nn.Module) -> bool:
    """Return whether a module computes RoPE frequencies in its forward pass (dynamic RoPE, by length).

    transformers 5.23, ``modeling_rope_utils.py``: such a module keeps the first ones in a buffer.
    """
    return "original_inv_freq" in dict(module.named_buffers(recurse=False))


def restore_frequencies(module: Any) -> None:
    """Restore a module's first RoPE frequencies, for which the longest row so far no longer counts.

    transformers 5.23, ``modeling_rope_utils.py``, ``dynamic_rope_update``: ``inv_freq`` is that of
    ``max_seq_len_cached`` positions.
    """
    module.inv_freq = module.original_inv_freq.clone()
    module.max_seq_len_cached = module.original_max_seq_len


def base_quantization(base: "PreTrainedModel") -> str:
    """Return the quantization of a loaded base, as the recipe writes it: ``nf4``, ``int8`` or ``none``.

    transformers 5.23, ``quantizers/quantizer_bnb_*.py``: flags that only quantized models have.
    """
    names_by_flag = {"is_loaded_in_4bit": "nf4", "is_loaded_in_8bit": "int8"}
    return next((name for flag, name in names_by_flag.items() if getattr(base, flag, False)), "none")


def disable_4bit_repacking(layer: "Linear4bit") -> None:
    """Stop a layer from repacking its 4-bit weight at the first generation on a CPU with AVX-512 BF16.

    bitsandbytes 0.50.2, ``nn/modules.py``: ``Linear4bit.forward`` reads the flag in evaluation mode.
    """
    layer.support_avx512bf16_for_cpu = False


def quant_state(tensor: Tensor) -> Any | None:
    """Return the quantization state of a 4-bit weight, None for others.

    bitsandbytes 0.50.2, ``nn/modules.py``: ``Params4bit.quant_state``; its ``shape`` is that of the weight
    before two values were packed into a byte.
    """
    return getattr(tensor, "quant_state", None)


def quantization_scales(weight: Tensor) -> list[Tensor]:
    """Return the floating-point scales of a quantized weight: of blocks (4 bit) or rows (int8); else none.

    bitsandbytes 0.50.2: ``functional.py``, ``QuantState`` (``absmax`` is quantized too if nested: then
    ``offset`` and ``state2`` hold its scales); ``nn/modules.py``, ``Int8Params.SCB``.
    """
    state = quant_state(weight)
    scales = [getattr(weight, "SCB", None)]
    if state is not None:
        scales += [state.absmax, state.offset, state.state2.absmax if state.nested else None]
    return [scale for scale in scales if scale is not None and scale.is_floating_point()]


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


def torch_extensions_folder() -> Path:
    """Return the folder of the extensions that torch compiles for this Python and device.

    torch 2.13, ``utils/cpp_extension.py``: without ``TORCH_EXTENSIONS_DIR`` it is in the user's cache.
    """
    from torch.utils.cpp_extension import _get_build_directory  # noqa: PLC0415 - for ZeRO only

    return Path(_get_build_directory("", verbose=False))


def replace_deepspeed_plugin(arguments: "TrainingArguments") -> None:
    """Let one process train a second time with ZeRO, as rejection sampling's rounds do.

    accelerate 1.15, ``state.py``: ``AcceleratorState`` keeps the plugin of the first training.
    transformers 5.23, ``training_args.py``: ``deepspeed_plugin`` is the plugin that a Trainer passes on.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None or not is_initialized():
        return
    # Select the new plugin, as accelerate does for several models.
    state = AcceleratorState()
    plugin.set_mixed_precision(state.mixed_precision)
    state.deepspeed_plugins = {CURRENT_PLUGIN: plugin}
    state.select_deepspeed_plugin(CURRENT_PLUGIN)
    # Accelerate refuses a plugin for a second Accelerator of a process; the selected one is used.
    arguments.deepspeed_plugin = None
