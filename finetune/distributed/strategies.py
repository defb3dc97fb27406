"""Distributed strategies: names, what each shards, arguments of transformers' Trainer, and rules.

DeepSpeed's ZeRO configs and FSDP2. No heavy imports: recipes and the planner read the names.

ZeRO shards optimizer states (stage 1), gradients too (2), weights too (3): Rajbhandari et al. 2019, arXiv
1910.02054, section 5.
"""

from pathlib import Path
from typing import Any

from finetune.recipe.compatibility import Rule

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
MULTI_PROCESS = ("ddp", *ZERO_STAGES, "fsdp2")

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


PRECISION_RULES = (
    Rule(
        "float16-cpu",
        {"model.precision": ("float16",), "device": ("cpu",)},
        "CPUs have no fast float16 kernels with loss scaling",
        source="finetune/training/auto_values.py",
        changes={"model.precision": "auto"},
    ),
    Rule(
        "bfloat16-emulated",
        {"model.precision": ("bfloat16",), "device": ("cuda",), "bfloat16": (False,)},
        "this GPU only emulates bfloat16, which is slower than float32",
        source="torch 2.13, cuda/__init__.py: is_bf16_supported(including_emulation=False)",
        evidence="source",
        changes={"model.precision": "auto"},
    ),
)

PROCESS_RULES = (
    Rule(
        "single-process-strategy",
        {"train.strategy": ("single",), "processes": ("several",)},
        "each process would train an independent model",
        source="finetune/training/launch.py",
        changes={"train.strategy": "ddp"},
        repair="train.strategy=auto, or train.num_processes=1",
    ),
    Rule(
        "one-process",
        {"train.strategy": MULTI_PROCESS, "processes": ("one",)},
        "the strategy needs multiple processes, but there is only one",
        source="finetune/training/launch.py",
        changes={"train.strategy": "single"},
        repair="train.num_processes=2 or more, or train.strategy=auto",
    ),
    Rule(
        "ddp-offload",
        {"train.strategy": ("ddp",), "train.offload": ("cpu",)},
        "offloading is a ZeRO feature; plain data parallelism has no offload",
        source="accelerate 1.15, accelerator.py: offloading belongs to the DeepSpeed and FSDP plug-ins",
        evidence="source",
        changes={"train.strategy": "zero2"},
    ),
    Rule(
        "ddp-nvme",
        {"train.strategy": ("ddp",), "train.offload": ("nvme",)},
        "only ZeRO-3 offloads to NVMe; plain data parallelism has no offload",
        source="accelerate 1.15, accelerator.py: offloading belongs to the DeepSpeed and FSDP plug-ins",
        evidence="source",
        changes={"train.strategy": "zero3"},
    ),
    Rule(
        "offload-one-process",
        {"train.offload": ("cpu", "nvme"), "processes": ("one",)},
        "offloading is a ZeRO feature, and ZeRO needs multiple processes here",
        source="finetune/training/launch.py",
        changes={"train.offload": "none"},
        repair="train.offload=none, or train.num_processes=2 or more",
    ),
)

OFFLOAD_RULES = (
    Rule(
        "fsdp2-offload",
        {"train.strategy": ("fsdp2",), "train.offload": ("cpu", "nvme")},
        "offloading is a ZeRO feature here: FSDP2 keeps its shards on the device",
        source="finetune/distributed/strategies.py; transformers 5.23: fsdp_cpu_offload needs a GPU",
        changes={"train.strategy": "zero3"},
    ),
    Rule(
        "nvme-cpu",
        {"train.offload": ("nvme",), "device": ("cpu",)},
        "DeepSpeed swaps GPU memory to NVMe, and there is no GPU",
        source="deepspeed 0.19.8, op_builder/async_io.py: pinned buffers and libaio, which is missing",
        evidence="source",
        changes={"train.offload": "none"},
    ),
    Rule(
        "nvme-needs-zero3",
        {"train.strategy": ("zero1", "zero2"), "train.offload": ("nvme",)},
        "DeepSpeed swaps to NVMe only in stage 3; stages 1 and 2 silently offload to the CPU",
        source="deepspeed 0.19.8, runtime/zero/stage_1_and_2.py: any offload device sets cpu_offload",
        evidence="source",
        changes={"train.strategy": "zero3"},
    ),
)

SHARDING_RULES = (
    Rule(
        "fsdp2-quantized",
        {"train.strategy": ("fsdp2",), "model.quantization": ("nf4", "int8")},
        "FSDP2's weights become DTensors while they are loaded, which bitsandbytes cannot quantize; ZeRO-3 "
        "partitions 4-bit weights after they are quantized",
        source="two CPU ranks: 'DTensor' object has no attribute 'compress_statistics'; bitsandbytes#1709",
        evidence="run",
        changes={"train.strategy": "zero3"},
    ),
    Rule(
        "int8-sharded",
        {"train.strategy": ("zero3",), "model.quantization": ("int8",)},
        "bitsandbytes' 8-bit layers keep the full weight in addition to the sharded parameter: no memory is "
        "saved, and on GPUs the loss was off by an order of magnitude",
        source="bitsandbytes 0.50.2, nn/modules.py: Linear8bitLt, state.CB; two CPU ranks equal one, each "
        "with all weights; bitsandbytes#1451 (ZeRO-3 wrong, ZeRO-1 and 2 right), accelerate#3730",
        evidence="run",
        changes={"train.strategy": "zero2"},
    ),
    Rule(
        "pissa-fsdp2",
        {"train.strategy": ("fsdp2",), "adapter.method": ("pissa",)},
        "PiSSA initializes from the SVD of the full weights and overwrites them; for this, PEFT gathers them "
        "under ZeRO-3, but does not support DTensors",
        source="peft 0.21.2, lora/layer.py: gather_params_ctx around pissa_init; ZeRO-3 tested: the losses "
        "of ddp",
        evidence="source",
        changes={"train.strategy": "zero3"},
    ),
    Rule(
        "dora-fsdp2",
        {"train.strategy": ("fsdp2",), "adapter.method": ("dora",)},
        "DoRA takes column norms of the full weights, and PEFT does not support DTensors",
        source="two CPU ranks: aten.add.Tensor got mixed torch.Tensor and DTensor; peft#1797",
        evidence="run",
        changes={"train.strategy": "zero3"},
    ),
    Rule(
        "fsdp2-full",
        {"train.strategy": ("fsdp2",), "traits.full_finetuning": (True,)},
        "in a checkpoint, each process would overwrite the optimizer shards of the others, so the run could "
        "not resume; ZeRO-3 writes all shards",
        source="two CPU ranks: it trains, and optimizer.pt holds one process's shard",
        evidence="run",
        changes={"train.strategy": "zero3"},
    ),
    Rule(
        "trl-sharded",
        {"train.strategy": SHARDED_WEIGHTS, "train.engine": ("trl",)},
        "sharded weights are not tested with TRL's trainers",
        source="finetune/engines/trl/trainer.py",
        changes={"train.strategy": "zero2"},
    ),
    Rule(
        "adafactor-zero",
        {"train.strategy": tuple(ZERO_STAGES), "train.optimizer": ("adafactor",)},
        "ZeRO flattens the parameters, so Adafactor has no rows and columns to factor: it would need as "
        "much memory as Adam's second moment, and compute different updates",
        source="deepspeed 0.19.8, stage_1_and_2.py: flatten; transformers 5.23, optimization.py: "
        "factored = len(param_shape) >= 2",
        evidence="source",
        changes={"train.optimizer": "adamw"},
    ),
    Rule(
        "adalora-zero",
        {"train.strategy": tuple(ZERO_STAGES), "adapter.method": ("adalora",)},
        "AdaLoRA scores its ranks by the gradients after each step, but DeepSpeed has cleared them by then",
        source="Gradients are only available immediately after backward and before engine step; accelerate "
        "1.15, utils/deepspeed.py: backward() steps and clears; peft#1721",
        evidence="run",
        changes={"train.strategy": "ddp"},
    ),
    Rule(
        "trainable-tokens-cpu",
        {"train.strategy": ("zero3",), "adapter.method": ("trainable_tokens",), "device": ("cpu",)},
        "PEFT gathers the rows of a sharded embedding on a CUDA device, even if there is none",
        source="peft 0.21.2, trainable_tokens/layer.py: _collect_token_weights; run: Torch not "
        "compiled with CUDA",
        evidence="run",
        changes={"train.strategy": "zero2"},
    ),
)

RULES = (*PRECISION_RULES, *PROCESS_RULES, *OFFLOAD_RULES, *SHARDING_RULES)
"""What a device, a number of processes and a strategy cannot be combined with, in the solver's order."""
