"""Peak memory of each phase of a run: load, rollout, forward and backward, optimizer step, merge, save."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from finetune.planning.caches import decoding
from finetune.planning.resident import Resident, gathered, resident
from finetune.planning.step import played, read
from finetune.planning.workload import PARTED_GRADIENTS, PARTED_WEIGHTS, Workload

PARTS = (
    "base",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits and loss",
    "key-value cache",
    "workspace",
)
SHARD = 5 * 10**9
"""Maximum bytes of one safetensors file, as transformers writes them; loading reads one at a time."""
CONTEXT = 512
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
    parts: Mapping[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_memory(workload: Workload) -> tuple[Phase, ...]:
    """Return the phases of a run in order.

    Only tensors are counted: the CUDA context and the fragmentation of the allocator are not included.

    Raises:
        UserError: the adapter's size is unknown.
    """
    held = resident(workload)
    # There is no optimizer state before the first step.
    phases = [Phase("load", _parts(replace(held, optimizer=0, base=_loaded(workload, held))), held.host)]
    own = {"base": held.base, "adapter": held.adapter, "optimizer": held.optimizer}
    shared = gathered(workload)
    if workload.rollout is not None:
        phases.append(_with("rollout", own, _rollout(workload), workspace=shared, host=held.host))
    if workload.objective == "ppo" or workload.live_reference:
        phases.append(_with("score", own, _read(_plain(workload)), workspace=shared, host=held.host))
    step = dict(_played(_plain(workload)))
    # The first micro-batch has no gradient to accumulate into, the later ones do.
    if workload.accumulated > 1:
        # The accumulated and the new gradient exist at once.
        step["gradients"] = held.gradients + step.get("gradients", 0)
    # DDP's reducer copies gradients into buckets, which stay allocated.
    buckets = held.gradients if workload.strategy == "ddp" else 0
    phases.append(_with("forward and backward", own, step, workspace=shared + buckets, host=held.host))
    taken = {"gradients": held.gradients, "workspace": held.step_workspace}
    phases.append(_with("optimizer step", own, taken, workspace=buckets, host=held.host))
    if not workload.adapter.whole_model:
        phases.append(Phase("merge", _merge(workload, held), held.host))
    # Weights are copied to host memory to be written: one shard of a model, or the full adapter.
    written = min(SHARD, held.base) if workload.adapter.whole_model else held.adapter
    return (*phases, Phase("save", _parts(held), held.host + written))


def peak(phases: Iterable[Phase]) -> Phase:
    """Return the phase with the highest peak."""
    return max(phases, key=lambda phase: phase.total)


def _loaded(workload: Workload, held: Resident) -> int:
    """Return the bytes of base weights during loading, before quantized ones are sharded.

    transformers 5.23 shards unquantized weights while it loads them; 4-bit weights are first loaded by every
    process in full.
    """
    if workload.quantization == "none" or workload.strategy not in PARTED_WEIGHTS:
        return held.base
    return resident(replace(workload, processes=1, strategy="single", offload="none")).base


def _parts(held: Resident) -> dict[str, int]:
    own = {"base": held.base, "adapter": held.adapter, "optimizer": held.optimizer}
    return dict.fromkeys(PARTS, 0) | own


def _with(name: str, own: Mapping[str, int], added: Mapping[str, int], *, workspace: int, host: int) -> Phase:
    parts = dict.fromkeys(PARTS, 0) | dict(own) | dict(added)
    return Phase(name, parts | {"workspace": parts["workspace"] + workspace}, host)


def _plain(workload: Workload) -> Workload:
    """Return the workload reduced to what one forward and backward pass depends on, as a cache key."""
    return replace(
        workload,
        optimizer="adamw",
        accumulated=min(workload.accumulated, 2),
        live_reference=False,
        scorers=0,
        rollout=None,
        processes=workload.processes if workload.strategy in PARTED_GRADIENTS else 1,
        # A pass depends on the strategy only by the sharding of its gradients, so equal passes share a cache
        # entry.
        strategy="zero2" if workload.strategy in PARTED_GRADIENTS else "single",
        offload="none",
    )


@lru_cache(CONTEXT)
def _played(workload: Workload) -> Mapping[str, int]:
    return played(workload).most


@lru_cache(CONTEXT)
def _read(workload: Workload) -> Mapping[str, int]:
    return read(workload).most


def _rollout(workload: Workload) -> Mapping[str, int]:
    """Return the larger of the prompts' prefill and the decoding of the last token."""
    asked = workload.rollout
    assert asked is not None
    prompts = replace(
        _plain(workload),
        objective="likelihood",
        lines=asked.lines,
        columns=asked.prompt,
        predicted=asked.lines,
        masked=True,
    )
    reading = _read(prompts)
    writing = decoding(workload)
    return writing if sum(writing.values()) > sum(reading.values()) else reading


def _merge(workload: Workload, held: Resident) -> dict[str, int]:
    """Return the memory of a merge: base, adapter, and the largest adapter product in float32."""
    largest = max(layer.inputs * layer.outputs for layer in workload.architecture.linear_layers())
    # A merge loads the base unquantized, in the compute dtype.
    base = workload.architecture.parameters * workload.bytes
    return dict.fromkeys(PARTS, 0) | {"base": base, "adapter": held.adapter, "workspace": 2 * 4 * largest}
