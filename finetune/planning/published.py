"""PUBLISHED.md: published memory figures next to the plan.

``python -m finetune.planning.published_memory`` prints it.
"""

from dataclasses import dataclass

from finetune.planning.architecture import Architecture
from finetune.planning.devices import GPUS, TAKEN, device
from finetune.planning.memory import Phase, peak, plan_memory
from finetune.planning.shapes import base_config
from finetune.planning.workload import Adapter, Rollout, Workload

GB, GIB = 10**9, 2**30
MERGE = "merge"
LITGPT = "litgpt, tutorials/resource-tables.md (A100-40G, PyTorch 2.1)"
TORCHTUNE = "torchtune, README.md, September 2024 (PyTorch 2.4, compiled)"
QLORA = "QLoRA (arXiv 2305.14314), abstract and section 5"
ANSWER = "answer.ai/posts/2024-03-06-fsdp-qlora"
ZERO = "ZeRO (arXiv 1910.02054), section 3.1: 16 bytes per parameter over all devices"

LLAMA_65B = {
    **{"model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016},
    **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 64},
    **{"max_position_embeddings": 2048, "tie_word_embeddings": False},
}
"""LLaMA-65B, which is no longer on the hub: 65,285,660,672 parameters."""


@dataclass(frozen=True)
class Case:
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

    what: str
    settings: str
    step: Workload
    source: str
    figure: float | None
    told: str
    room: int
    why: str
    another_way: bool = False

    @property
    def peak(self) -> Phase:
        """Return the run's phase with the highest peak."""
        # A merge is a command of its own; published figures are those of training.
        return peak(phase for phase in plan_memory(self.step) if phase.name != MERGE)


def _base(name: str) -> Architecture:
    return Architecture.of(base_config(name))


def _litgpt(base: str, *, quantization: str = "none", rows: int = 1) -> Workload:
    """Return litgpt's settings: rank 8 on queries and values, Alpaca's longest row of 1,304 tokens."""
    return Workload(
        _base(base),
        Adapter("lora", rank=8, targets=("q_proj", "v_proj")),
        quantization=quantization,  # type: ignore[arg-type]
        lines=rows,
        columns=1304,
        predicted=rows * 1304,
        masked=rows > 1,
        accumulated=128 // rows,
    )


def _torchtune(base: str, *, quantization: str = "none", processes: int = 1) -> Workload:
    """Return torchtune's settings: rank 8, two packed rows of 2,048 tokens, gradient checkpointing."""
    return Workload(
        _base(base),
        Adapter("lora", rank=8, targets=("q_proj", "v_proj", "o_proj")),
        quantization=quantization,  # type: ignore[arg-type]
        lines=2,
        columns=2048,
        predicted=4096,
        checkpointing=True,
        processes=processes,
        strategy="fsdp2" if processes > 1 else "single",
    )


def _qlora(architecture: Architecture, *, columns: int, processes: int = 1) -> Workload:
    return Workload(
        architecture,
        Adapter("qlora", rank=64),
        quantization="nf4",
        optimizer="paged_adamw",
        lines=1,
        columns=columns,
        predicted=columns,
        accumulated=16,
        checkpointing=True,
        processes=processes,
        strategy="zero3" if processes > 1 else "single",
    )


def _full(base: str, *, rows: int, columns: int) -> Workload:
    return Workload(
        _base(base),
        Adapter("full"),
        lines=rows,
        columns=columns,
        predicted=rows * columns,
        masked=rows > 1,
        checkpointing=True,
        processes=8,
        strategy="zero3",
    )


def _ppo(base: str, quantization: str) -> Workload:
    return Workload(
        _base(base),
        Adapter("lora", rank=16),
        objective="ppo",
        quantization=quantization,  # type: ignore[arg-type]
        lines=2,
        columns=640,
        predicted=256,
        completions=2,
        masked=True,
        accumulated=256,
        checkpointing=True,
        heads=1,
        scorers=1,
        rollout=Rollout(lines=16, prompt=512, completion=128),
    )


COMPUTED = (
    "their adapter and AdamW are bfloat16, ours float32; their loss takes the logits in chunks of 128 tokens"
)
STORED = (
    "by arithmetic NF4 saves {less} GB of weights; their figure is lower by {told}: we do not know what uses "
    "the rest"
)
COMPILED = (
    "the base alone has {base} GiB and the checkpoints {kept}: their compiled chunked loss adds little, "
    "while ours holds the logits of a micro-batch (vocabulary of 128,256) in float32"
)

CASES = (
    Case(
        "llama-2-7b, LoRA",
        "bfloat16, rank 8 on q and v, 1 row of 1,304 tokens",
        _litgpt("llama-2-7b"),
        LITGPT,
        21.30 * GB,
        "21.30 GB",
        0,
        COMPUTED,
    ),
    Case(
        "llama-2-7b, LoRA",
        "the same with 2 rows",
        _litgpt("llama-2-7b", rows=2),
        LITGPT,
        29.07 * GB,
        "29.07 GB",
        0,
        COMPUTED,
    ),
    Case(
        "llama-2-7b, QLoRA",
        "the same with 1 row on NF4, double quantization",
        _litgpt("llama-2-7b", quantization="nf4"),
        LITGPT,
        13.84 * GB,
        "13.84 GB (14.14 without double quantization)",
        0,
        STORED.format(less="9.6", told="7.5"),
    ),
    Case(
        "llama-2-13b, LoRA",
        "bfloat16, rank 8 on q and v, 1 row of 1,304 tokens",
        _litgpt("llama-2-13b"),
        LITGPT,
        38.12 * GB,
        "38.12 GB",
        0,
        COMPUTED,
    ),
    Case(
        "llama-2-13b, QLoRA",
        "the same on NF4, double quantization",
        _litgpt("llama-2-13b", quantization="nf4"),
        LITGPT,
        22.55 * GB,
        "22.55 GB",
        0,
        STORED.format(less="18.8", told="15.6"),
    ),
    Case(
        "llama-3.1-8b, LoRA",
        "bfloat16, rank 8, 2 rows of 2,048 tokens, checkpointing",
        _torchtune("llama-3.1-8b"),
        TORCHTUNE,
        16.2 * GIB,
        "16.2 GiB",
        0,
        COMPILED.format(base="15.0", kept="1.0"),
    ),
    Case(
        "llama-3.1-8b, QLoRA",
        "the same on NF4",
        _torchtune("llama-3.1-8b", quantization="nf4"),
        TORCHTUNE,
        7.4 * GIB,
        "7.4 GiB",
        0,
        COMPILED.format(base="5.3", kept="1.0"),
    ),
    Case(
        "llama-3.1-70b, LoRA",
        "bfloat16, rank 8, 2 rows of 2,048 tokens, checkpointing, FSDP2 on 8 GPUs",
        _torchtune("llama-3.1-70b", processes=8),
        TORCHTUNE,
        27.6 * GIB,
        "27.6 GiB per GPU",
        0,
        COMPILED.format(base="16.4", kept="5.0"),
    ),
    Case(
        "LLaMA-65B, QLoRA",
        "NF4, rank 64 everywhere, 1 row of 1,024 tokens, checkpointing, paged AdamW",
        _qlora(Architecture.of(LLAMA_65B), columns=1024),
        QLORA,
        None,
        "fits one GPU of 48 GB",
        GPUS["a6000"].room,
        "the paper gives no peak, only that it is below 48 GB",
    ),
    Case(
        "llama-2-70b, QLoRA",
        "the same, one GPU of 48 GB",
        _qlora(_base("llama-2-70b"), columns=1024),
        "none found",
        None,
        "-",
        GPUS["a6000"].room,
        "grouped keys and values, but 5 % more weights than the 65B",
    ),
    Case(
        "llama-2-70b, QLoRA",
        "NF4, rank 64 everywhere, 1 row of 512 tokens, checkpointing, ZeRO-3 on 2 GPUs of 24 GB",
        _qlora(_base("llama-2-70b"), columns=512, processes=2),
        ANSWER,
        None,
        "trains on two GPUs of 24 GB",
        device("24GB").room,
        "their loader gives each GPU its shard; transformers first loads all 4-bit weights in each process",
        another_way=True,
    ),
    Case(
        "llama-2-7b, full fine-tuning",
        "ZeRO-3 on 8 GPUs of 80 GB, 4 rows of 2,048 tokens, checkpointing, AdamW",
        _full("llama-2-7b", rows=4, columns=2048),
        ZERO,
        16 * 6_738_415_616 / 8,
        "13.5 GB of weights, gradients and optimizer",
        GPUS["a100-80g"].room,
        "autocast's bfloat16 copies of all weights, activations, logits and gathered layers are the rest",
    ),
    Case(
        "llama-2-13b, full fine-tuning",
        "the same",
        _full("llama-2-13b", rows=4, columns=2048),
        ZERO,
        16 * 13_015_864_320 / 8,
        "26.0 GB of weights, gradients and optimizer",
        GPUS["a100-80g"].room,
        "autocast's bfloat16 copies of all weights, activations, logits and gathered layers are the rest",
    ),
    Case(
        "llama-2-70b, full fine-tuning",
        "the same",
        _full("llama-2-70b", rows=4, columns=2048),
        ZERO,
        16 * 68_976_648_192 / 8,
        "138 GB of weights, gradients and optimizer: does not fit",
        GPUS["a100-80g"].room,
        "16 GPUs, or an offloaded optimizer",
    ),
    Case(
        "llama-2-7b, PPO on one base",
        "bfloat16, policy and value rank 16, 2 episodes of 640 tokens, checkpointing",
        _ppo("llama-2-7b", "none"),
        "none found",
        None,
        "-",
        device("24GB").room,
        "four models of 7B have 54 GB of weights; here the four roles share one base",
    ),
    Case(
        "llama-2-7b, PPO on one base",
        "the same on NF4",
        _ppo("llama-2-7b", "nf4"),
        "none found",
        None,
        "-",
        device("24GB").room,
        "as above",
    ),
)

HEAD = """\
# Published memory figures and the plan

Generated from `finetune/planning/published_memory.py` by `python -m finetune.planning.published_memory`; a
test compares them. The plan counts what PyTorch's allocator hands out in our program with these settings; the
CUDA context takes about {context} on top. GB are 10^9 bytes and GiB 2^30, as in each source. "Fits" compares
with the free memory of such a GPU (`finetune/planning/devices.py`).

| model and method | settings | published | plan | plan / published | fits | where the difference comes from |
| --- | --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    """Return PUBLISHED.md."""
    lines = [_line(case) for case in CASES]
    sources = [f"* {what}" for what in (LITGPT, TORCHTUNE, QLORA, ANSWER, ZERO)]
    head = HEAD.format(context=f"{TAKEN['cuda'] / GIB:g} GiB")
    return head + "\n".join(lines) + "\n\nSources:\n\n" + "\n".join(sources) + "\n"


def _line(case: Case) -> str:
    total, unit, name = case.peak.total, GIB, "GiB"
    # Each plan is printed in the unit of its source.
    if "GB" in case.told:
        unit, name = GB, "GB"
    ratio = "" if case.figure is None else f"{total / case.figure:.2f}"
    fits = "" if not case.room else "yes" if total <= case.room else "no"
    plan = f"{total / unit:.1f} {name} ({case.peak.name})"
    return "| " + " | ".join((case.what, case.settings, case.told, plan, ratio, fits, case.why)) + " |"


if __name__ == "__main__":
    print(page(), end="")
