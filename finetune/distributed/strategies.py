"""Distributed strategies: names, what each shards, and their arguments of transformers' Trainer.

DeepSpeed's ZeRO configs and FSDP2. No heavy imports: recipes and the planner read the names.

ZeRO shards optimizer states (stage 1), gradients too (2), weights too (3): Rajbhandari et al. 2019, arXiv
1910.02054, section 5.
"""

from pathlib import Path
from typing import Any

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
"""The order in which ``auto`` tries them: those that shard more communicate more."""
ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
"""DeepSpeed's strategies and their ZeRO stages."""
SHARDED_WEIGHTS = ("zero3", "fsdp2")
SHARDED_GRADIENTS = ("zero2", *SHARDED_WEIGHTS)
SHARDED_OPTIMIZER = ("zero1", *SHARDED_GRADIENTS)
"""Strategies that shard the weights, the gradients and the optimizer states, respectively."""
REPLICATED = ("ddp", "zero1", "zero2")
"""Strategies under which each process holds all trained weights."""

SWAP_FOLDER = ".swap"
"""Folder for tensors offloaded to NVMe, inside the run's folder."""


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
