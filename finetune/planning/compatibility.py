"""Which settings do not go together, why, and who says so: data alone, read by ``finetune.planning.solver``.

Whatever no rule here speaks of works. COMPATIBILITY.md is made of it by ``finetune.planning.matrix``.
``evidence`` is how a fact was found out: *run* (tried here, on the versions in constraints.txt), *source*
(read in the library's code), *thread* (reported by its users), *ours* (how this program is built).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Fact = str | bool


@dataclass(frozen=True)
class Rule:
    """A combination that does not work as it is.

    Attributes:
        name: what it is called in tables.
        when: fact -> the values of it for which this holds; all of them must.
        reason: why.
        source: who says so.
        evidence: how it was found out.
        changes: recipe key -> a value with which it would work; empty: there is none.
        repair: what the user can do, in other words than these changes.
    """

    name: str
    when: Mapping[str, tuple[Fact, ...]]
    reason: str
    source: str
    evidence: Literal["run", "source", "thread", "ours"]
    changes: Mapping[str, Any] = field(default_factory=dict)
    repair: str = ""

    def hits(self, facts: Mapping[str, Fact]) -> bool:
        """Tell whether a combination's facts are these."""
        return all(facts[name] in values for name, values in self.when.items())


ZERO = ("zero1", "zero2", "zero3")
SHARED = ("ddp", *ZERO, "fsdp2")
WEIGHTS_APART = ("zero3", "fsdp2")
"""Strategies under which each process holds a part of the weights."""

OF_THE_ADAPTER = (
    Rule(
        "storage",
        {"adapter_takes_it": (False,)},
        "the adapter is not made for a base that is stored so",
        "what adapters declare: finetune/adapters/*.py, TRAITS.quantization",
        "ours",
        {"model.quantization": "auto"},
    ),
    Rule(
        "engine",
        {"adapter_has_engine": (False,)},
        "the adapter needs what TRL's trainers do not offer: to act between the steps, or a head behind it",
        "finetune/adapters/*.py, TRAITS.engines; llama_adapter tried here: TRL finds no log_probs",
        "ours",
        {"train.engine": "native"},
    ),
    Rule(
        "scores",
        {"stage": ("reward",), "adapter_scores": (False,)},
        "PEFT's record of the adapter has no room for the head that scores",
        "finetune/adapters/*.py, TRAITS.scores",
        "ours",
        repair="another adapter of `llm-align list adapters`, such as lora",
    ),
    Rule(
        "copied",
        {"stage": ("dpo",), "engine": ("trl",), "changes_base": (True,)},
        "TRL copies the adapter for its reference, and the copy would change the base again",
        "align/dpo/checks.py",
        "ours",
        {"train.engine": "native"},
    ),
    Rule(
        "copied-always",
        {"stage": ("kto", "rloo", "grpo"), "engine": ("trl",), "changes_base": (True,)},
        "TRL copies the adapter for its reference, and the copy would change the base again",
        "align/dpo/checks.py",
        "ours",
        repair="adapter.method=lora, or another one that leaves the base as it is",
    ),
    Rule(
        "two-passes",
        {"stage": ("dpo", "ppo"), "two_passes": (True,)},
        "pulling the predictions of two passes together is a loss on labels, and there are none here",
        "align/dpo/tuning.py, align/ppo/tuning.py",
        "ours",
        {"adapter.consistency": False},
    ),
)

OF_THE_STAGE = (
    Rule(
        "trl-alone",
        {"stage": ("kto", "rloo", "grpo"), "engine": ("native",)},
        "TRL's trainer runs this stage",
        "DESIGN: methods that TRL does well run on TRL",
        "ours",
        {"train.engine": "trl"},
    ),
    Rule(
        "no-trl",
        {"stage": ("ppo",), "engine": ("trl",)},
        "TRL has no PPO trainer since 0.25",
        "trl 1.16: no PPOTrainer, not in trl.experimental either",
        "source",
        {"train.engine": "native"},
    ),
)

OF_THE_HARDWARE = (
    Rule(
        "float16-cpu",
        {"precision": ("float16",), "device": ("cpu",)},
        "a CPU has no loss-scaled float16 kernels worth using",
        "finetune/planning/choices.py",
        "ours",
        {"model.precision": "auto"},
    ),
    Rule(
        "bfloat16-imitated",
        {"precision": ("bfloat16",), "device": ("cuda",), "bfloat16": (False,)},
        "this GPU only imitates bfloat16, slower than it computes float32",
        "torch 2.13, cuda/__init__.py: is_bf16_supported(including_emulation=False)",
        "source",
        {"model.precision": "auto"},
    ),
)

OF_THE_PROCESSES = (
    Rule(
        "alone-not",
        {"strategy": ("single",), "processes": ("several",)},
        "each of the processes would train a model of its own",
        "finetune/training/launch.py",
        "ours",
        {"train.strategy": "ddp"},
        "train.strategy=auto, or train.processes=1",
    ),
    Rule(
        "nobody-to-share",
        {"strategy": SHARED, "processes": ("one",)},
        "there is one process, and nobody to share with",
        "finetune/training/launch.py",
        "ours",
        {"train.strategy": "single"},
        "train.processes=2 or more, or train.strategy=auto",
    ),
    Rule(
        "nothing-offloaded",
        {"strategy": ("ddp",), "offload": ("cpu",)},
        "offloading is ZeRO's; plain data parallelism keeps everything where it is",
        "accelerate 1.15, accelerator.py: offloading belongs to the DeepSpeed and FSDP plug-ins",
        "source",
        {"train.strategy": "zero2"},
    ),
    Rule(
        "nothing-swapped",
        {"strategy": ("ddp",), "offload": ("nvme",)},
        "ZeRO-3 offloads to NVMe; plain data parallelism keeps everything where it is",
        "accelerate 1.15, accelerator.py: offloading belongs to the DeepSpeed and FSDP plug-ins",
        "source",
        {"train.strategy": "zero3"},
    ),
    Rule(
        "offload-alone",
        {"offload": ("cpu", "nvme"), "processes": ("one",)},
        "offloading is ZeRO's, which needs several processes here",
        "finetune/training/launch.py",
        "ours",
        {"train.offload": "none"},
        "train.offload=none, or train.processes=2 or more",
    ),
)

OF_THE_OFFLOAD = (
    Rule(
        "fsdp2-offload",
        {"strategy": ("fsdp2",), "offload": ("cpu", "nvme")},
        "offloading is ZeRO's here: FSDP2 keeps its parts on the device",
        "finetune/training/strategies.py; transformers 5.23: fsdp_cpu_offload needs a GPU",
        "ours",
        {"train.strategy": "zero3"},
    ),
    Rule(
        "nvme-cpu",
        {"offload": ("nvme",), "device": ("cpu",)},
        "DeepSpeed swaps what a GPU holds; here nothing lies outside of the CPU's memory",
        "deepspeed 0.19.8, op_builder/async_io.py: pinned buffers and libaio, which is not there",
        "source",
        {"train.offload": "none"},
    ),
    Rule(
        "nvme-needs-zero3",
        {"strategy": ("zero1", "zero2"), "offload": ("nvme",)},
        "DeepSpeed swaps to NVMe in stage 3 alone; stages 1 and 2 put it on the CPU without a word",
        "deepspeed 0.19.8, runtime/zero/stage_1_and_2.py: any offload device sets cpu_offload",
        "source",
        {"train.strategy": "zero3"},
    ),
)

OF_THE_WEIGHTS = (
    Rule(
        "judges-apart",
        {"stage": ("ppo", "rejection", "rloo", "grpo"), "strategy": WEIGHTS_APART},
        "reward and value models stand on the policy's own base in memory, and each process would hold a "
        "part of it alone; ZeRO-2 keeps the weights whole",
        "ppo tried on two CPU ranks with ZeRO-3: Cannot copy out of meta tensor "
        "(align/reward/shared_base.py); the other stages load their rewards in the same way",
        "run",
        {"train.strategy": "zero2"},
    ),
    Rule(
        "fsdp2-quantized",
        {"strategy": ("fsdp2",), "quantization": ("nf4", "int8")},
        "FSDP2's weights become DTensors while they are read, which bitsandbytes cannot quantize; ZeRO-3 "
        "partitions 4-bit weights after they are quantized",
        "tried on two CPU ranks: 'DTensor' object has no attribute 'compress_statistics'; bitsandbytes#1709",
        "run",
        {"train.strategy": "zero3"},
    ),
    Rule(
        "int8-apart",
        {"strategy": ("zero3",), "quantization": ("int8",)},
        "bitsandbytes' 8-bit layers keep the whole weight beside the parameter that is partitioned: no "
        "memory is saved, and on GPUs the loss was off by an order of magnitude",
        "bitsandbytes 0.50.2, nn/modules.py: Linear8bitLt, state.CB; two CPU ranks compute what one does, "
        "each with all weights; bitsandbytes#1451 (ZeRO-3 wrong, ZeRO-1 and 2 right), accelerate#3730",
        "run",
        {"train.strategy": "zero2"},
    ),
    Rule(
        "rewritten-base",
        {"strategy": ("fsdp2",), "adapter": ("pissa",)},
        "PiSSA begins by taking the whole weights apart and writing them anew; PEFT fetches them for that "
        "under ZeRO-3, and knows no DTensors",
        "peft 0.21.2, lora/layer.py: gather_params_ctx around pissa_init; ZeRO-3 run here: the losses of ddp",
        "source",
        {"train.strategy": "zero3"},
    ),
    Rule(
        "dora-norms",
        {"strategy": ("fsdp2",), "adapter": ("dora",)},
        "DoRA measures the whole weights' columns, and PEFT knows no DTensors",
        "tried on two CPU ranks: aten.add.Tensor got mixed torch.Tensor and DTensor; peft#1797",
        "run",
        {"train.strategy": "zero3"},
    ),
    Rule(
        "fsdp2-full",
        {"strategy": ("fsdp2",), "whole_model": (True,)},
        "each process would write its part of the optimizer over the others' in checkpoints, and the run "
        "could not go on; ZeRO-3 writes all parts",
        "tried on two CPU ranks: it trains, and optimizer.pt holds one process's part",
        "run",
        {"train.strategy": "zero3"},
    ),
    Rule(
        "trl-whole",
        {"strategy": WEIGHTS_APART, "engine": ("trl",)},
        "with TRL's trainers weights in parts are not tried",
        "finetune/training/trl_engine.py",
        "ours",
        {"train.strategy": "zero2"},
    ),
    Rule(
        "adafactor-flat",
        {"strategy": ZERO, "optimizer": ("adafactor",)},
        "ZeRO lays the parameters out in one line, and Adafactor has no rows and columns to factor: it "
        "would hold as much as Adam's second moment and compute something else",
        "deepspeed 0.19.8, stage_1_and_2.py: flatten; transformers 5.23, optimization.py: "
        "factored = len(param_shape) >= 2",
        "source",
        {"train.optimizer": "adamw"},
    ),
    Rule(
        "rank-budget",
        {"strategy": ZERO, "adapter": ("adalora",)},
        "AdaLoRA weighs its ranks by the gradients after each step, which DeepSpeed has cleared by then",
        "tried: Gradients are only available immediately after backward and before engine step; accelerate "
        "1.15, utils/deepspeed.py: backward() steps and clears; peft#1721",
        "run",
        {"train.strategy": "ddp"},
    ),
    Rule(
        "tokens-cpu",
        {"strategy": ("zero3",), "adapter": ("trainable_tokens",), "device": ("cpu",)},
        "PEFT gathers the rows of a partitioned embedding on a CUDA device, whatever the device is",
        "peft 0.21.2, trainable_tokens/layer.py: _collect_token_weights; tried: Torch not compiled with CUDA",
        "run",
        {"train.strategy": "zero2"},
    ),
)

RULES: tuple[Rule, ...] = (
    *OF_THE_ADAPTER,
    *OF_THE_STAGE,
    *OF_THE_HARDWARE,
    *OF_THE_PROCESSES,
    *OF_THE_OFFLOAD,
    *OF_THE_WEIGHTS,
)
