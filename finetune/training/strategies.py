"""How processes share a model, in the words of the engines: Accelerate, DeepSpeed and PyTorch.

ZeRO partitions optimizer states (stage 1), gradients too (2), weights too (3): Rajbhandari et al. 2019, arXiv
1910.02054, section 5.
"""

from typing import Any

from accelerate.state import AcceleratorState, is_initialized
from transformers import TrainingArguments

ZERO = {"zero1": 1, "zero2": 2, "zero3": 3}
"""Strategies that DeepSpeed carries out, and their stages."""

CURRENT = "current"
"""What Accelerate knows the DeepSpeed of a further training by."""


def engine_words(strategy: str) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer for a strategy; none where Accelerate needs no word.

    The optimizer is PyTorch's, as in one process, so that the numbers are those of one process. DeepSpeed
    on a CPU must not be asked for with ``use_cpu``: Accelerate would drop DeepSpeed without a word.
    """
    if strategy not in ZERO:
        return {}
    filled_in = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    config: dict[str, Any] = {
        "zero_optimization": {"stage": ZERO[strategy]},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        **dict.fromkeys(filled_in, "auto"),
    }
    return {
        "use_cpu": False,
        "accelerator_config": {"use_configured_state": True},
        "deepspeed": config,
    }


def train_again(arguments: TrainingArguments) -> None:
    """Let a process train another time with ZeRO, as in rounds: Accelerate takes DeepSpeed from the first alone.

    The further training's DeepSpeed is selected in the first one's place, as Accelerate does for several models.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None or not is_initialized():
        return
    state = AcceleratorState()
    plugin.set_mixed_precision(state.mixed_precision)
    state.deepspeed_plugins = {CURRENT: plugin}
    state.select_deepspeed_plugin(CURRENT)
    arguments.deepspeed_plugin = None
