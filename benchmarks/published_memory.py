"""PUBLISHED.md: published memory figures next to the plan.

``python -m benchmarks.published_memory`` prints it.
"""

from dataclasses import dataclass

from benchmarks.peft_memory import published_section
from finetune.distributed.hardware import GPUS, RESERVED_BYTES, device_by_name
from finetune.planner.architecture import Architecture
from finetune.planner.memory import Phase, peak_phase, plan_memory
from finetune.planner.workload import Adapter, GenerationBatch, Workload
from finetune.recipe.base_config import load_base_config

GB, GIB = 10**9, 2**30
EXCLUDED_PHASE = "merge"
LITGPT = "litgpt, tutorials/resource-tables.md (A100-40G, PyTorch 2.1)"
TORCHTUNE = "torchtune, README.md, September 2024 (PyTorch 2.4, compiled)"
QLORA = "QLoRA (arXiv 2305.14314), abstract and section 5"
ANSWER_AI = "answer.ai/posts/2024-03-06-fsdp-qlora"
ZERO_PAPER = "ZeRO (arXiv 1910.02054), section 3.1: 16 bytes per parameter over all devices"

LLAMA_65B = {
    **{"model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016},
    **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 64},
    **{"max_position_embeddings": 2048, "tie_word_embeddings": False},
}
"""LLaMA-65B, which is no longer on the hub: 65,285,660,672 parameters."""


@dataclass(frozen=True)
class PublishedCase:
    """A published figure and the workload with the same settings.

    Attributes:
        title: model and method.
        settings: in words.
        workload: the same for the planner.
        source: who published it.
        published_bytes: None: no figure was published, or only that it fits.
        published_text: the figure as it was published.
        available_bytes: memory of the GPU that it is said to fit; 0: none is named.
        explanation: where the difference comes from.
        different_loader: whether our libraries cannot load the model the way theirs do.
    """

    title: str
    settings: str
    workload: Workload
    source: str
    published_bytes: float | None
    published_text: str
    available_bytes: int
    explanation: str
    different_loader: bool = False

    @property
    def peak(self) -> Phase:
        """Return the run's phase with the highest peak."""
        # A merge is a command of its own; published figures are those of training.
        return peak_phase(phase for phase in plan_memory(self.workload) if phase.name != EXCLUDED_PHASE)


def _load_architecture(name: str) -> Architecture:
    return Architecture.from_config(load_base_config(name))


def _litgpt_workload(base: str, *, quantization: str = "none", rows: int = 1) -> Workload:
    """Return litgpt's settings: rank 8 on queries and values, Alpaca's longest row of 1,304 tokens."""
    return Workload(
        _load_architecture(base),
        Adapter("lora", rank=8, targets=("q_proj", "v_proj")),
        quantization=quantization,  # type: ignore[arg-type]
        rows=rows,
        seq_len=1304,
        predicted=rows * 1304,
        masked=rows > 1,
        accumulation_steps=128 // rows,
    )


def _torchtune_workload(base: str, *, quantization: str = "none", processes: int = 1) -> Workload:
    """Return torchtune's settings: rank 8, two packed rows of 2,048 tokens, gradient checkpointing."""
    return Workload(
        _load_architecture(base),
        Adapter("lora", rank=8, targets=("q_proj", "v_proj", "o_proj")),
        quantization=quantization,  # type: ignore[arg-type]
        rows=2,
        seq_len=2048,
        predicted=4096,
        checkpointing=True,
        processes=processes,
        strategy="fsdp2" if processes > 1 else "single",
    )


def _qlora_workload(architecture: Architecture, *, seq_len: int, processes: int = 1) -> Workload:
    return Workload(
        architecture,
        Adapter("qlora", rank=64),
        quantization="nf4",
        optimizer="paged_adamw",
        rows=1,
        seq_len=seq_len,
        predicted=seq_len,
        accumulation_steps=16,
        checkpointing=True,
        processes=processes,
        strategy="zero3" if processes > 1 else "single",
    )


def _full_workload(base: str, *, rows: int, seq_len: int) -> Workload:
    return Workload(
        _load_architecture(base),
        Adapter("full"),
        rows=rows,
        seq_len=seq_len,
        predicted=rows * seq_len,
        masked=rows > 1,
        checkpointing=True,
        processes=8,
        strategy="zero3",
    )


def _shared_base_ppo_workload(base: str, quantization: str) -> Workload:
    return Workload(
        _load_architecture(base),
        Adapter("lora", rank=16),
        objective="ppo",
        quantization=quantization,  # type: ignore[arg-type]
        rows=2,
        seq_len=640,
        predicted=256,
        completions=2,
        masked=True,
        accumulation_steps=256,
        checkpointing=True,
        heads=1,
        scorers=1,
        rollout=GenerationBatch(rows=16, prompt=512, completion=128),
    )


DTYPE_EXPLANATION = (
    "their adapter and AdamW are bfloat16, ours float32; their loss takes the logits in chunks of 128 tokens"
)
NF4_EXPLANATION = (
    "by arithmetic NF4 saves {less} GB of weights; their figure is lower by {measured}: we do not know "
    "what uses the rest"
)
CHUNKED_LOSS_EXPLANATION = (
    "the base alone has {base} GiB and the checkpoints {retained}: their compiled chunked loss adds little, "
    "while ours holds the logits of a micro-batch (vocabulary of 128,256) in float32"
)

PUBLISHED_CASES = (
    PublishedCase(
        "llama-2-7b, LoRA",
        "bfloat16, rank 8 on q and v, 1 row of 1,304 tokens",
        _litgpt_workload("llama-2-7b"),
        LITGPT,
        21.30 * GB,
        "21.30 GB",
        0,
        DTYPE_EXPLANATION,
    ),
    PublishedCase(
        "llama-2-7b, LoRA",
        "the same with 2 rows",
        _litgpt_workload("llama-2-7b", rows=2),
        LITGPT,
        29.07 * GB,
        "29.07 GB",
        0,
        DTYPE_EXPLANATION,
    ),
    PublishedCase(
        "llama-2-7b, QLoRA",
        "the same with 1 row on NF4, double quantization",
        _litgpt_workload("llama-2-7b", quantization="nf4"),
        LITGPT,
        13.84 * GB,
        "13.84 GB (14.14 without double quantization)",
        0,
        NF4_EXPLANATION.format(less="9.6", measured="7.5"),
    ),
    PublishedCase(
        "llama-2-13b, LoRA",
        "bfloat16, rank 8 on q and v, 1 row of 1,304 tokens",
        _litgpt_workload("llama-2-13b"),
        LITGPT,
        38.12 * GB,
        "38.12 GB",
        0,
        DTYPE_EXPLANATION,
    ),
    PublishedCase(
        "llama-2-13b, QLoRA",
        "the same on NF4, double quantization",
        _litgpt_workload("llama-2-13b", quantization="nf4"),
        LITGPT,
        22.55 * GB,
        "22.55 GB",
        0,
        NF4_EXPLANATION.format(less="18.8", measured="15.6"),
    ),
    PublishedCase(
        "llama-3.1-8b, LoRA",
        "bfloat16, rank 8, 2 rows of 2,048 tokens, checkpointing",
        _torchtune_workload("llama-3.1-8b"),
        TORCHTUNE,
        16.2 * GIB,
        "16.2 GiB",
        0,
        CHUNKED_LOSS_EXPLANATION.format(base="15.0", retained="1.0"),
    ),
    PublishedCase(
        "llama-3.1-8b, QLoRA",
        "the same on NF4",
        _torchtune_workload("llama-3.1-8b", quantization="nf4"),
        TORCHTUNE,
        7.4 * GIB,
        "7.4 GiB",
        0,
        CHUNKED_LOSS_EXPLANATION.format(base="5.3", retained="1.0"),
    ),
    PublishedCase(
        "llama-3.1-70b, LoRA",
        "bfloat16, rank 8, 2 rows of 2,048 tokens, checkpointing, FSDP2 on 8 GPUs",
        _torchtune_workload("llama-3.1-70b", processes=8),
        TORCHTUNE,
        27.6 * GIB,
        "27.6 GiB per GPU",
        0,
        CHUNKED_LOSS_EXPLANATION.format(base="16.4", retained="5.0"),
    ),
    PublishedCase(
        "LLaMA-65B, QLoRA",
        "NF4, rank 64 everywhere, 1 row of 1,024 tokens, checkpointing, paged AdamW",
        _qlora_workload(Architecture.from_config(LLAMA_65B), seq_len=1024),
        QLORA,
        None,
        "fits one GPU of 48 GB",
        GPUS["a6000"].available_bytes,
        "the paper gives no peak, only that it is below 48 GB",
    ),
    PublishedCase(
        "llama-2-70b, QLoRA",
        "the same, one GPU of 48 GB",
        _qlora_workload(_load_architecture("llama-2-70b"), seq_len=1024),
        "none found",
        None,
        "-",
        GPUS["a6000"].available_bytes,
        "grouped keys and values, but 5 % more weights than the 65B",
    ),
    PublishedCase(
        "llama-2-70b, QLoRA",
        "NF4, rank 64 everywhere, 1 row of 512 tokens, checkpointing, ZeRO-3 on 2 GPUs of 24 GB",
        _qlora_workload(_load_architecture("llama-2-70b"), seq_len=512, processes=2),
        ANSWER_AI,
        None,
        "trains on two GPUs of 24 GB",
        device_by_name("24GB").available_bytes,
        "their loader gives each GPU its shard; transformers first loads all 4-bit weights in each process",
        different_loader=True,
    ),
    PublishedCase(
        "llama-2-7b, full fine-tuning",
        "ZeRO-3 on 8 GPUs of 80 GB, 4 rows of 2,048 tokens, checkpointing, AdamW",
        _full_workload("llama-2-7b", rows=4, seq_len=2048),
        ZERO_PAPER,
        16 * 6_738_415_616 / 8,
        "13.5 GB of weights, gradients and optimizer",
        GPUS["a100-80g"].available_bytes,
        "autocast's bfloat16 copies of all weights, activations, logits and gathered layers are the rest",
    ),
    PublishedCase(
        "llama-2-13b, full fine-tuning",
        "the same",
        _full_workload("llama-2-13b", rows=4, seq_len=2048),
        ZERO_PAPER,
        16 * 13_015_864_320 / 8,
        "26.0 GB of weights, gradients and optimizer",
        GPUS["a100-80g"].available_bytes,
        "autocast's bfloat16 copies of all weights, activations, logits and gathered layers are the rest",
    ),
    PublishedCase(
        "llama-2-70b, full fine-tuning",
        "the same",
        _full_workload("llama-2-70b", rows=4, seq_len=2048),
        ZERO_PAPER,
        16 * 68_976_648_192 / 8,
        "138 GB of weights, gradients and optimizer: does not fit",
        GPUS["a100-80g"].available_bytes,
        "16 GPUs, or an offloaded optimizer",
    ),
    PublishedCase(
        "llama-2-7b, PPO on one base",
        "bfloat16, policy and value rank 16, 2 episodes of 640 tokens, checkpointing",
        _shared_base_ppo_workload("llama-2-7b", "none"),
        "none found",
        None,
        "-",
        device_by_name("24GB").available_bytes,
        "four models of 7B have 54 GB of weights; here the four roles share one base",
    ),
    PublishedCase(
        "llama-2-7b, PPO on one base",
        "the same on NF4",
        _shared_base_ppo_workload("llama-2-7b", "nf4"),
        "none found",
        None,
        "-",
        device_by_name("24GB").available_bytes,
        "as above",
    ),
)

PUBLISHED_HEADER = """\
# Published memory figures compared with the plan

This page is generated by `python -m benchmarks.published_memory`; a test compares it with the code. The plan
counts what PyTorch reserves in llm-align with these settings. The CUDA context takes another {context}.
GB are 10^9 bytes and GiB 2^30 bytes, as in each source. "Fits" compares the plan with the free memory of such
a GPU (`finetune/distributed/hardware.py`).

| model and method | settings | published | plan | plan / published | fits | where the difference comes from |
| --- | --- | --- | --- | --- | --- | --- |
"""


def published_page() -> str:
    """Return PUBLISHED.md."""
    rows = [_table_row(case) for case in PUBLISHED_CASES]
    sources = [f"* {source}" for source in (LITGPT, TORCHTUNE, QLORA, ANSWER_AI, ZERO_PAPER)]
    header = PUBLISHED_HEADER.format(context=f"{RESERVED_BYTES['cuda'] / GIB:g} GiB")
    return header + "\n".join(rows) + "\n\nSources:\n\n" + "\n".join(sources) + "\n" + published_section()


def _table_row(case: PublishedCase) -> str:
    total, unit, name = case.peak.total, GIB, "GiB"
    # Each plan is printed in the unit of its source.
    if "GB" in case.published_text:
        unit, name = GB, "GB"
    ratio = "" if case.published_bytes is None else f"{total / case.published_bytes:.2f}"
    fits = "" if not case.available_bytes else "yes" if total <= case.available_bytes else "no"
    plan = f"{total / unit:.1f} {name} ({case.peak.name})"
    return (
        "| "
        + " | ".join((case.title, case.settings, case.published_text, plan, ratio, fits, case.explanation))
        + " |"
    )


if __name__ == "__main__":
    print(published_page(), end="")
