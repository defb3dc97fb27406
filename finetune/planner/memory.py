"""Peak memory of each phase of a run: load, rollout, forward and backward, optimizer step, merge, save."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from finetune.distributed.strategies import SHARDED_GRADIENTS, SHARDED_WEIGHTS
from finetune.planner.attention import decoding_memory
from finetune.planner.static_memory import StaticMemory, gathered_weight_bytes, static_memory
from finetune.planner.train_step import simulate_forward, simulate_train_step
from finetune.planner.workload import Workload

CATEGORIES = (
    "base",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits and loss",
    "key-value cache",
    "workspace",
    "allocator",
)
STATIC_CATEGORIES = ("base", "adapter", "optimizer")
"""Allocated once, before training: no fragments between them."""
ALLOCATOR_FRACTION = 0.056
"""Bytes that PyTorch's CUDA allocator reserves beyond the tensors, per byte that a step allocates and frees.

Measured, not derived: the mean over 16 adapters of PEFT's benchmark (0.036 to 0.069), whose steps were
replayed through the allocator's algorithm (benchmarks/peft_memory.py). The row length of that benchmark was
chosen by one of its published peaks; the others are predictions (benchmarks/PUBLISHED.md).
"""
STEP_ALLOCATOR_FRACTION = 0.3
"""The same per byte of an optimizer step's temporaries, which are as large as the trained weights and do not
fit the blocks that activations leave.

Measured on one case, full fine-tuning in the same benchmark: 0.37 by its published peak, in replays 0.41 with
rows of 693 tokens and 0 with rows of 740. A value between them is within 1.5 % of the published peak.
"""
MERGE_PHASE = "merge"
"""Merging an adapter into its base: a command of its own, after the run."""
ROW_INDEPENDENT_PHASES = (MERGE_PHASE, "rollout")
"""Phases whose memory does not depend on the micro-batch size."""
MAX_SHARD_BYTES = 5 * 10**9
"""Maximum bytes of one safetensors file, as transformers writes them; loading reads one at a time."""
SIMULATION_CACHE_SIZE = 512
"""Size of the LRU cache of simulated passes: a search repeats the same pass many times."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Memory of one process at the peak of a phase.

    Attributes:
        name: load, rollout, score, forward and backward, optimizer step, merge, save.
        categories: device bytes by category (``CATEGORIES``).
        host: bytes of host memory, not counting the Python process itself.
    """

    name: str
    categories: Mapping[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.categories.values())


def plan_memory(workload: Workload) -> tuple[Phase, ...]:
    """Return the phases of a run in order.

    The CUDA context is not included; on a GPU the allocator's share is, in phases that train or generate.

    Raises:
        UserError: the adapter's size is unknown.
    """
    static = static_memory(workload)
    # There is no optimizer state before the first step.
    phases = [
        Phase(
            "load",
            _static_categories(replace(static, optimizer=0, base=_loading_base_bytes(workload, static))),
            static.host,
        )
    ]
    step_workspace = static.step_workspace if workload.device == "cuda" else None
    phase = partial(_phase, host=static.host, step_workspace=step_workspace)
    resident_bytes = {"base": static.base, "adapter": static.adapter, "optimizer": static.optimizer}
    gathered_bytes = gathered_weight_bytes(workload)
    if workload.rollout is not None:
        phases.append(phase("rollout", resident_bytes, _generation_peak(workload), workspace=gathered_bytes))
    if workload.objective == "ppo" or workload.live_reference:
        phases.append(
            phase("score", resident_bytes, _forward_peak(_pass_workload(workload)), workspace=gathered_bytes)
        )
    train_step = dict(_train_step_peak(_pass_workload(workload)))
    # The first micro-batch has no gradient to accumulate into, the later ones do.
    if workload.accumulation_steps > 1:
        # The accumulated and the new gradient exist at once.
        train_step["gradients"] = static.gradients + train_step.get("gradients", 0)
    # DDP's reducer copies gradients into buckets, which stay allocated.
    buckets = static.gradients if workload.strategy == "ddp" else 0
    phases.append(
        phase("forward and backward", resident_bytes, train_step, workspace=gathered_bytes + buckets)
    )
    optimizer_step = {"gradients": static.gradients, "workspace": static.step_workspace}
    phases.append(phase("optimizer step", resident_bytes, optimizer_step, workspace=buckets))
    if not workload.adapter.full_finetuning:
        phases.append(Phase(MERGE_PHASE, _merge_categories(workload, static), static.host))
    # Weights are copied to host memory to be written: one shard of a model, or the full adapter.
    saved_bytes = min(MAX_SHARD_BYTES, static.base) if workload.adapter.full_finetuning else static.adapter
    return (*phases, Phase("save", _static_categories(static), static.host + saved_bytes))


def peak_phase(phases: Iterable[Phase]) -> Phase:
    """Return the phase with the highest peak."""
    return max(phases, key=lambda phase: phase.total)


def _loading_base_bytes(workload: Workload, static: StaticMemory) -> int:
    """Return the bytes of base weights during loading, before quantized ones are sharded.

    transformers 5.23 shards unquantized weights while it loads them; 4-bit weights are first loaded by every
    process in full.
    """
    if workload.quantization == "none" or workload.strategy not in SHARDED_WEIGHTS:
        return static.base
    return static_memory(replace(workload, processes=1, strategy="single", offload="none")).base


def _static_categories(static: StaticMemory) -> dict[str, int]:
    resident_bytes = {"base": static.base, "adapter": static.adapter, "optimizer": static.optimizer}
    return dict.fromkeys(CATEGORIES, 0) | resident_bytes


def _phase(
    name: str,
    resident_bytes: Mapping[str, int],
    transient_bytes: Mapping[str, int],
    *,
    workspace: int,
    host: int,
    step_workspace: int | None,
) -> Phase:
    """Return a phase of training; ``step_workspace``: None where no caching allocator is used (on a CPU)."""
    categories = dict.fromkeys(CATEGORIES, 0) | dict(resident_bytes) | dict(transient_bytes)
    categories["workspace"] += workspace
    if step_workspace is not None:
        transient = sum(categories.values()) - sum(categories[name] for name in STATIC_CATEGORIES)
        categories["allocator"] = allocator_bytes(transient, step_workspace)
    return Phase(name, categories, host)


def allocator_bytes(transient: int, step_workspace: int) -> int:
    """Return the bytes that PyTorch's CUDA allocator reserves beyond the tensors of a step.

    Segments and blocks are rounded up, and free blocks between used ones are too small for other tensors.

    Args:
        transient: bytes that the step allocates and frees.
        step_workspace: temporaries of the optimizer step; their fragments remain in the steps after it.
    """
    return round(ALLOCATOR_FRACTION * transient + STEP_ALLOCATOR_FRACTION * step_workspace)


def _pass_workload(workload: Workload) -> Workload:
    """Return the workload reduced to what one forward and backward pass depends on, as a cache key."""
    return replace(
        workload,
        optimizer="adamw",
        # One micro-batch or several: all after the first accumulate into existing gradients.
        accumulation_steps=min(workload.accumulation_steps, 2),
        live_reference=False,
        scorers=0,
        rollout=None,
        processes=workload.processes if workload.strategy in SHARDED_GRADIENTS else 1,
        # A pass depends on the strategy only by the sharding of its gradients, so equal passes share a cache
        # entry.
        strategy="zero2" if workload.strategy in SHARDED_GRADIENTS else "single",
        offload="none",
    )


@lru_cache(SIMULATION_CACHE_SIZE)
def _train_step_peak(workload: Workload) -> Mapping[str, int]:
    return simulate_train_step(workload).peak_by_category


@lru_cache(SIMULATION_CACHE_SIZE)
def _forward_peak(workload: Workload) -> Mapping[str, int]:
    return simulate_forward(workload).peak_by_category


def _generation_peak(workload: Workload) -> Mapping[str, int]:
    """Return the larger of the prompts' prefill and the decoding of the last token."""
    generation = workload.rollout
    assert generation is not None
    prefill_workload = replace(
        _pass_workload(workload),
        objective="likelihood",
        rows=generation.rows,
        seq_len=generation.prompt,
        predicted=generation.rows,
        masked=True,
    )
    prefill = _forward_peak(prefill_workload)
    decode = decoding_memory(workload)
    return decode if sum(decode.values()) > sum(prefill.values()) else prefill


def _merge_categories(workload: Workload, static: StaticMemory) -> dict[str, int]:
    """Return the memory of a merge: base, adapter, and the largest adapter product in float32."""
    largest = max(layer.in_features * layer.out_features for layer in workload.architecture.linear_layers())
    # A merge loads the base unquantized, in the compute dtype.
    base = workload.architecture.parameters * workload.itemsize
    return dict.fromkeys(CATEGORIES, 0) | {
        "base": base,
        "adapter": static.adapter,
        "workspace": 2 * 4 * largest,
    }
