"""How processes share a model, in the words of the engines: Accelerate, DeepSpeed and PyTorch.

ZeRO partitions optimizer states (stage 1), gradients too (2), weights too (3): Rajbhandari et al. 2019, arXiv
1910.02054, section 5.
"""

from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, is_initialized
from transformers import TrainingArguments

ZERO = {"zero1": 1, "zero2": 2, "zero3": 3}
"""Strategies that DeepSpeed carries out, and their stages."""
APART = ("zero3", "fsdp2")
"""Strategies under which a process holds a part of the weights and fetches the others as it computes."""
SWAP = ".swap"
"""Folder for what is offloaded to NVMe, in the run's own."""

CURRENT = "current"
"""What Accelerate knows the DeepSpeed of a further training by."""


def engine_words(
    strategy: str, *, precision: str = "float32", offload: str = "none", folder: Path = Path()
) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer for a strategy; none where Accelerate needs no word.

    The optimizer is PyTorch's, as in one process, so that the numbers are those of one process. DeepSpeed
    on a CPU must not be asked for with ``use_cpu``: Accelerate would drop DeepSpeed without a word.

    Args:
        strategy: ``zero1``, ``zero2``, ``zero3``, ``fsdp2``, or another one, which needs no words.
        precision: type of the forward pass.
        offload: where optimizer states (stage 3: weights too) are kept between uses.
        folder: where they are put with ``nvme``.
    """
    if strategy == "fsdp2":
        return {"save_only_model": True}  # the Trainer refuses to write more; whole_checkpoint does
    if strategy not in ZERO:
        return {}
    filled_in = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    config: dict[str, Any] = {
        "zero_optimization": _zero(strategy, offload, folder) | {"reduce_bucket_size": "auto"},
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # or Accelerate replaces it where it is offloaded
        "gradient_clipping": "auto",
        **dict.fromkeys(filled_in, "auto"),
        **_passes(precision),
    }
    return {
        "use_cpu": False,
        "bf16": False,  # PyTorch's autocast in its place, see below
        "fp16": False,
        "accelerator_config": {"use_configured_state": True},
        "deepspeed": config,
    }


def loading_words(stored: str, *, offload: str = "none", folder: Path = Path()) -> dict[str, Any]:
    """Return DeepSpeed's configuration while a base is loaded in parts, one for each process.

    Args:
        stored: type of its weights; DeepSpeed would make float32 of all that is not asked for here.
        offload: where the parts are kept.
        folder: where they are put with ``nvme``.
    """
    return {
        "zero_optimization": _zero("zero3", offload, folder),
        "train_micro_batch_size_per_gpu": 1,  # nothing is trained with it, but DeepSpeed wants a number
        "bf16": {"enabled": stored == "bfloat16"},
        "fp16": {"enabled": stored == "float16"},
    }


def measuring_words(hidden: int, *, offload: str = "none", folder: Path = Path()) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a model that is looked at before it is trained.

    Args:
        hidden: width of the model's states; what transformers' Trainer fills in for ``auto``.
        offload: where weights are kept.
        folder: where they are put with ``nvme``.
    """
    sizes = {"stage3_param_persistence_threshold": 10 * hidden, "reduce_bucket_size": hidden * hidden}
    zero = _zero("zero3", offload, folder) | {"stage3_prefetch_bucket_size": hidden * hidden} | sizes
    zero.pop("offload_optimizer", None)  # there is none
    return {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}


def _zero(strategy: str, offload: str, folder: Path) -> dict[str, Any]:
    words: dict[str, Any] = {"stage": ZERO[strategy]}
    if strategy == "zero3":  # buffers and parameters that stay whole, by the model's width
        words |= dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
        words["stage3_gather_16bit_weights_on_model_save"] = True  # of any type, for checkpoints
    if offload != "none":
        place = {"device": offload} | ({"nvme_path": str(folder / SWAP)} if offload == "nvme" else {})
        words["offload_optimizer"] = place
        if strategy == "zero3":
            words["offload_param"] = place
    return words


def _passes(precision: str) -> dict[str, Any]:
    """Return how a pass is computed: base in ``precision``, trained weights in float32, as in one process.

    DeepSpeed's own bf16 and fp16 would round the trained weights too. Without safe modules gradients are
    averaged in their own type.
    """
    if precision == "float32":
        return {}
    return {"torch_autocast": {"enabled": True, "dtype": precision, "lower_precision_safe_modules": []}}


def train_again(arguments: TrainingArguments) -> None:
    """Let a process train another time with ZeRO, as in rounds; Accelerate takes it from the first alone.

    The further one is selected in the first one's place, as Accelerate does for several models.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None or not is_initialized():
        return
    state = AcceleratorState()
    plugin.set_mixed_precision(state.mixed_precision)
    state.deepspeed_plugins = {CURRENT: plugin}
    state.select_deepspeed_plugin(CURRENT)
    arguments.deepspeed_plugin = None
