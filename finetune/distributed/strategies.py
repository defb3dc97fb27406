"""Distributed strategies as arguments of transformers' Trainer: DeepSpeed's ZeRO configs and FSDP2.

ZeRO shards optimizer states (stage 1), gradients too (2), weights too (3): Rajbhandari et al. 2019, arXiv
1910.02054, section 5.
"""

from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, is_initialized
from transformers import TrainingArguments

from finetune.distributed.strategy_names import ZERO_STAGES

SWAP_FOLDER = ".swap"
"""Folder for tensors offloaded to NVMe, inside the run's folder."""

CURRENT_PLUGIN = "current"
"""Accelerate's name for the DeepSpeed plugin of a second training in one process."""


def strategy_arguments(
    strategy: str, *, precision: str = "float32", offload: str = "none", folder: Path = Path()
) -> dict[str, Any]:
    """Return a strategy's arguments of transformers' Trainer; empty for ``single`` and ``ddp``.

    Args:
        strategy: ``zero1``, ``zero2``, ``zero3``, ``fsdp2``, ``ddp`` or ``single``.
        precision: dtype of the forward pass.
        offload: where optimizer states (stage 3: weights too) are stored between uses.
        folder: root of the swap folder for ``nvme``.
    """
    if strategy == "fsdp2":
        return {"save_only_model": True}  # the Trainer refuses to write more; full_checkpoint does
    if strategy not in ZERO_STAGES:
        return {}
    # `auto`: transformers' Trainer fills in its own arguments, so that they cannot contradict each other.
    auto_keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    config: dict[str, Any] = {
        "zero_optimization": _zero_config(strategy, offload, folder) | {"reduce_bucket_size": "auto"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: losses equal those of a single process
        "zero_force_ds_cpu_optimizer": False,  # or offloading replaces it with DeepSpeed's CPU Adam
        "gradient_clipping": "auto",
        **dict.fromkeys(auto_keys, "auto"),
        **_autocast_config(precision),
    }
    return {
        "use_cpu": False,  # with use_cpu, Accelerate silently drops DeepSpeed
        "bf16": False,  # torch's autocast instead, see `_autocast_config`
        "fp16": False,
        "accelerator_config": {"use_configured_state": True},
        "deepspeed": config,
    }


def zero3_init_config(dtype: str, *, offload: str = "none", folder: Path = Path()) -> dict[str, Any]:
    """Return DeepSpeed's configuration for loading a base sharded (``zero.Init``).

    Args:
        dtype: dtype of its weights; without it DeepSpeed converts them to float32.
        offload: where the shards are stored.
        folder: root of the swap folder for ``nvme``.
    """
    return {
        "zero_optimization": _zero_config("zero3", offload, folder),
        "train_micro_batch_size_per_gpu": 1,  # unused: DeepSpeed requires a batch size even without training
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }


def zero3_inference_config(
    hidden_size: int, *, offload: str = "none", folder: Path = Path()
) -> dict[str, Any]:
    """Return DeepSpeed's ZeRO-3 configuration for an engine without optimizer.

    Args:
        hidden_size: the model's hidden size, from which transformers' Trainer computes the ``auto`` values.
        offload: where weights are stored.
        folder: root of the swap folder for ``nvme``.
    """
    # Written out, because no Trainer exists yet that would replace `auto`.
    bucket_sizes = {
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "reduce_bucket_size": hidden_size * hidden_size,
    }
    zero = (
        _zero_config("zero3", offload, folder)
        | {"stage3_prefetch_bucket_size": hidden_size * hidden_size}
        | bucket_sizes
    )
    zero.pop("offload_optimizer", None)  # this engine has no optimizer
    return {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}


def _zero_config(strategy: str, offload: str, folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {"stage": ZERO_STAGES[strategy]}
    if strategy == "zero3":  # prefetch buffer and replicated small parameters, from the hidden size
        config |= dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
        config["stage3_gather_16bit_weights_on_model_save"] = True  # of any dtype, despite the name
    if offload != "none":
        offload_target = {"device": offload} | (
            {"nvme_path": str(folder / SWAP_FOLDER)} if offload == "nvme" else {}
        )
        config["offload_optimizer"] = offload_target
        if strategy == "zero3":
            config["offload_param"] = offload_target
    return config


def _autocast_config(precision: str) -> dict[str, Any]:
    """Return the autocast settings: base in ``precision``, trained weights in float32, as in one process."""
    if precision == "float32":
        return {}
    # DeepSpeed's own bf16 and fp16 would round the trained weights too. With an empty list of safe modules
    # gradients are averaged in their own dtype.
    return {"torch_autocast": {"enabled": True, "dtype": precision, "lower_precision_safe_modules": []}}


def reset_deepspeed_state(arguments: TrainingArguments) -> None:
    """Let one process train a second time with ZeRO, as rejection sampling's rounds do."""
    # Accelerate keeps the first training's DeepSpeed plugin: select the new one, as for several models.
    plugin = arguments.deepspeed_plugin
    if plugin is None or not is_initialized():
        return
    state = AcceleratorState()
    plugin.set_mixed_precision(state.mixed_precision)
    state.deepspeed_plugins = {CURRENT_PLUGIN: plugin}
    state.select_deepspeed_plugin(CURRENT_PLUGIN)
    # Accelerate refuses a plugin for a second Accelerator of a process; the selected one is used.
    arguments.deepspeed_plugin = None
