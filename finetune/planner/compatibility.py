"""Compatibility rules: which settings cannot be combined, why, and the source of each claim.

Everything that no rule excludes works. ``finetune.planner.solver`` evaluates the rules, and
``finetune.planner.compatibility_page`` makes COMPATIBILITY.md of them. ``evidence`` is how a claim was
established: *run* (tested here, on the versions in constraints.txt), *source* (read in the library's code),
*thread* (reported by its users), *ours* (our own design).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.distributed.strategies import SHARDED_WEIGHTS, ZERO_STAGES

PropertyValue = str | bool


@dataclass(frozen=True)
class CompatibilityRule:
    """A combination of settings that does not work.

    Attributes:
        name: its label in tables.
        when: property -> the values for which this applies; all of them must match.
        reason: why it does not work.
        source: reference for the claim.
        evidence: how the claim was established.
        changes: recipe key -> a value that works; empty: there is none.
        repair: a repair that ``changes`` cannot express.
    """

    name: str
    when: Mapping[str, tuple[PropertyValue, ...]]
    reason: str
    source: str
    evidence: Literal["run", "source", "thread", "ours"]
    changes: Mapping[str, Any] = field(default_factory=dict)
    repair: str = ""

    def applies(self, properties: Mapping[str, PropertyValue]) -> bool:
        """Return whether the rule applies to a combination with these properties."""
        return all(properties[name] in values for name, values in self.when.items())


ZERO_STRATEGIES = tuple(ZERO_STAGES)
MULTI_PROCESS_STRATEGIES = ("ddp", *ZERO_STRATEGIES, "fsdp2")

ADAPTER_RULES = (
    CompatibilityRule(
        "quantization",
        {"quantization_supported": (False,)},
        "the adapter does not support this quantization of the base",
        "finetune/adapters/*.py, TRAITS.quantization",
        "ours",
        {"model.quantization": "auto"},
    ),
    CompatibilityRule(
        "engine",
        {"engine_supported": (False,)},
        "the adapter needs hooks between steps or access to the output head, which TRL's trainers lack",
        "finetune/adapters/*.py, TRAITS.engines; llama_adapter tested here: TRL finds no log_probs",
        "ours",
        {"train.engine": "native"},
    ),
    CompatibilityRule(
        "reward-head",
        {"stage": ("reward",), "reward_head_supported": (False,)},
        "PEFT cannot save a reward head with this adapter",
        "finetune/adapters/*.py, TRAITS.scoring_unsupported",
        "ours",
        repair="another adapter of `llm-align list adapters`, such as lora",
    ),
    CompatibilityRule(
        "trl-reference",
        {"stage": ("dpo",), "engine": ("trl",), "changes_base": (True,)},
        "TRL copies the adapter for its reference, and the copy would change the base again",
        "align/dpo/checks.py",
        "ours",
        {"train.engine": "native"},
    ),
    CompatibilityRule(
        "trl-reference-only",
        {"stage": ("kto", "rloo", "grpo"), "engine": ("trl",), "changes_base": (True,)},
        "TRL copies the adapter for its reference, and the copy would change the base again",
        "align/dpo/checks.py",
        "ours",
        repair="adapter.method=lora, or another one that does not change the base",
    ),
    CompatibilityRule(
        "consistency",
        {"stage": ("dpo", "ppo"), "two_passes": (True,)},
        "the consistency loss of two forward passes needs labels, and this stage has none",
        "align/dpo/method.py, align/ppo/method.py",
        "ours",
        {"adapter.consistency": False},
    ),
)

STAGE_RULES = (
    CompatibilityRule(
        "trl-only",
        {"stage": ("kto", "rloo", "grpo"), "engine": ("native",)},
        "this stage runs on TRL's trainer alone",
        "DESIGN: methods that TRL does well run on TRL",
        "ours",
        {"train.engine": "trl"},
    ),
    CompatibilityRule(
        "native-only",
        {"stage": ("ppo",), "engine": ("trl",)},
        "TRL 1.16 has no PPO trainer",
        "trl 1.16: no PPOTrainer, not in trl.experimental either",
        "source",
        {"train.engine": "native"},
    ),
)

HARDWARE_RULES = (
    CompatibilityRule(
        "float16-cpu",
        {"precision": ("float16",), "device": ("cpu",)},
        "CPUs have no fast float16 kernels with loss scaling",
        "finetune/training/auto_values.py",
        "ours",
        {"model.precision": "auto"},
    ),
    CompatibilityRule(
        "bfloat16-emulated",
        {"precision": ("bfloat16",), "device": ("cuda",), "bfloat16": (False,)},
        "this GPU only emulates bfloat16, which is slower than float32",
        "torch 2.13, cuda/__init__.py: is_bf16_supported(including_emulation=False)",
        "source",
        {"model.precision": "auto"},
    ),
)

PROCESS_RULES = (
    CompatibilityRule(
        "single-process-strategy",
        {"strategy": ("single",), "processes": ("several",)},
        "each process would train an independent model",
        "finetune/training/launch.py",
        "ours",
        {"train.strategy": "ddp"},
        "train.strategy=auto, or train.num_processes=1",
    ),
    CompatibilityRule(
        "one-process",
        {"strategy": MULTI_PROCESS_STRATEGIES, "processes": ("one",)},
        "the strategy needs several processes, and there is one",
        "finetune/training/launch.py",
        "ours",
        {"train.strategy": "single"},
        "train.num_processes=2 or more, or train.strategy=auto",
    ),
    CompatibilityRule(
        "ddp-offload",
        {"strategy": ("ddp",), "offload": ("cpu",)},
        "offloading is a ZeRO feature; plain data parallelism has no offload",
        "accelerate 1.15, accelerator.py: offloading belongs to the DeepSpeed and FSDP plug-ins",
        "source",
        {"train.strategy": "zero2"},
    ),
    CompatibilityRule(
        "ddp-nvme",
        {"strategy": ("ddp",), "offload": ("nvme",)},
        "only ZeRO-3 offloads to NVMe; plain data parallelism has no offload",
        "accelerate 1.15, accelerator.py: offloading belongs to the DeepSpeed and FSDP plug-ins",
        "source",
        {"train.strategy": "zero3"},
    ),
    CompatibilityRule(
        "offload-one-process",
        {"offload": ("cpu", "nvme"), "processes": ("one",)},
        "offloading is a ZeRO feature, and ZeRO needs several processes here",
        "finetune/training/launch.py",
        "ours",
        {"train.offload": "none"},
        "train.offload=none, or train.num_processes=2 or more",
    ),
)

OFFLOAD_RULES = (
    CompatibilityRule(
        "fsdp2-offload",
        {"strategy": ("fsdp2",), "offload": ("cpu", "nvme")},
        "offloading is a ZeRO feature here: FSDP2 keeps its shards on the device",
        "finetune/distributed/strategies.py; transformers 5.23: fsdp_cpu_offload needs a GPU",
        "ours",
        {"train.strategy": "zero3"},
    ),
    CompatibilityRule(
        "nvme-cpu",
        {"offload": ("nvme",), "device": ("cpu",)},
        "DeepSpeed swaps GPU memory to NVMe, and on a CPU there is none",
        "deepspeed 0.19.8, op_builder/async_io.py: pinned buffers and libaio, which is not there",
        "source",
        {"train.offload": "none"},
    ),
    CompatibilityRule(
        "nvme-needs-zero3",
        {"strategy": ("zero1", "zero2"), "offload": ("nvme",)},
        "DeepSpeed swaps to NVMe in stage 3 alone; stages 1 and 2 silently offload to the CPU",
        "deepspeed 0.19.8, runtime/zero/stage_1_and_2.py: any offload device sets cpu_offload",
        "source",
        {"train.strategy": "zero3"},
    ),
)

SHARDING_RULES = (
    CompatibilityRule(
        "reward-models-sharded",
        {"stage": ("ppo", "rejection", "rloo", "grpo"), "strategy": SHARDED_WEIGHTS},
        "reward and value models share the policy's base in memory, which would be sharded; ZeRO-2 "
        "replicates the weights",
        "ppo on two CPU ranks with ZeRO-3: Cannot copy out of meta tensor "
        "(align/reward/shared_base.py); the other stages load their rewards in the same way",
        "run",
        {"train.strategy": "zero2"},
    ),
    CompatibilityRule(
        "fsdp2-quantized",
        {"strategy": ("fsdp2",), "quantization": ("nf4", "int8")},
        "FSDP2's weights become DTensors while they are loaded, which bitsandbytes cannot quantize; ZeRO-3 "
        "partitions 4-bit weights after they are quantized",
        "two CPU ranks: 'DTensor' object has no attribute 'compress_statistics'; bitsandbytes#1709",
        "run",
        {"train.strategy": "zero3"},
    ),
    CompatibilityRule(
        "int8-sharded",
        {"strategy": ("zero3",), "quantization": ("int8",)},
        "bitsandbytes' 8-bit layers keep the full weight in addition to the sharded parameter: no memory is "
        "saved, and on GPUs the loss was off by an order of magnitude",
        "bitsandbytes 0.50.2, nn/modules.py: Linear8bitLt, state.CB; two CPU ranks equal one, each with all "
        "weights; bitsandbytes#1451 (ZeRO-3 wrong, ZeRO-1 and 2 right), accelerate#3730",
        "run",
        {"train.strategy": "zero2"},
    ),
    CompatibilityRule(
        "pissa-fsdp2",
        {"strategy": ("fsdp2",), "adapter": ("pissa",)},
        "PiSSA initializes from the SVD of the full weights and overwrites them; PEFT gathers them for that "
        "under ZeRO-3, and does not support DTensors",
        "peft 0.21.2, lora/layer.py: gather_params_ctx around pissa_init; ZeRO-3 tested: the losses of ddp",
        "source",
        {"train.strategy": "zero3"},
    ),
    CompatibilityRule(
        "dora-fsdp2",
        {"strategy": ("fsdp2",), "adapter": ("dora",)},
        "DoRA takes column norms of the full weights, and PEFT does not support DTensors",
        "two CPU ranks: aten.add.Tensor got mixed torch.Tensor and DTensor; peft#1797",
        "run",
        {"train.strategy": "zero3"},
    ),
    CompatibilityRule(
        "fsdp2-full",
        {"strategy": ("fsdp2",), "full_finetuning": (True,)},
        "in checkpoints each process would overwrite the others' optimizer shards, and the run could not "
        "resume; ZeRO-3 writes all shards",
        "two CPU ranks: it trains, and optimizer.pt holds one process's shard",
        "run",
        {"train.strategy": "zero3"},
    ),
    CompatibilityRule(
        "trl-sharded",
        {"strategy": SHARDED_WEIGHTS, "engine": ("trl",)},
        "sharded weights are not tested with TRL's trainers",
        "finetune/engines/trl/sft.py",
        "ours",
        {"train.strategy": "zero2"},
    ),
    CompatibilityRule(
        "adafactor-zero",
        {"strategy": ZERO_STRATEGIES, "optimizer": ("adafactor",)},
        "ZeRO flattens the parameters, and Adafactor has no rows and columns to factor: it would need as "
        "much memory as Adam's second moment and compute something else",
        "deepspeed 0.19.8, stage_1_and_2.py: flatten; transformers 5.23, optimization.py: "
        "factored = len(param_shape) >= 2",
        "source",
        {"train.optimizer": "adamw"},
    ),
    CompatibilityRule(
        "adalora-zero",
        {"strategy": ZERO_STRATEGIES, "adapter": ("adalora",)},
        "AdaLoRA scores its ranks by the gradients after each step, which DeepSpeed has cleared by then",
        "Gradients are only available immediately after backward and before engine step; accelerate "
        "1.15, utils/deepspeed.py: backward() steps and clears; peft#1721",
        "run",
        {"train.strategy": "ddp"},
    ),
    CompatibilityRule(
        "trainable-tokens-cpu",
        {"strategy": ("zero3",), "adapter": ("trainable_tokens",), "device": ("cpu",)},
        "PEFT gathers the rows of a sharded embedding on a CUDA device, whatever the device is",
        "peft 0.21.2, trainable_tokens/layer.py: _collect_token_weights; run: Torch not compiled with CUDA",
        "run",
        {"train.strategy": "zero2"},
    ),
)

COMPATIBILITY_RULES: tuple[CompatibilityRule, ...] = (
    *ADAPTER_RULES,
    *STAGE_RULES,
    *HARDWARE_RULES,
    *PROCESS_RULES,
    *OFFLOAD_RULES,
    *SHARDING_RULES,
)
