"""The most memory that each phase of a run holds, in bytes, from shapes alone."""

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
"""Bytes of a file of weights at most, as transformers writes them; one is read back at a time."""
CONTEXT = 512
"""Plans that are remembered: a search asks for the same pass many times."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What one process holds at the fullest moment of a phase.

    Attributes:
        name: load, rollout, score, forward and backward, optimizer step, merge, save.
        parts: bytes on the device, by what they are for (``PARTS``).
        host: bytes in the memory of the machine, beside what the program itself takes.
    """

    name: str
    parts: Mapping[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Return the bytes on the device."""
        return sum(self.parts.values())


def plan_memory(workload: Workload) -> tuple[Phase, ...]:
    """Return the phases of a run in their order, as far as it has them.

    Tensors alone are counted: what a device's own context takes, and the gaps that its allocator leaves, come
    on top.

    Raises:
        UserError: an adapter whose size is not known here.
    """
    held = resident(workload)
    phases = [Phase("load", _parts(replace(held, optimizer=0, base=_loaded(workload, held))), held.host)]
    own = {"base": held.base, "adapter": held.adapter, "optimizer": held.optimizer}
    shared = gathered(workload)
    if workload.rollout is not None:
        phases.append(_with("rollout", own, _rollout(workload), workspace=shared, host=held.host))
    if workload.objective == "ppo" or workload.live_reference:
        phases.append(_with("score", own, _read(_plain(workload)), workspace=shared, host=held.host))
    step = dict(_played(_plain(workload)))
    if workload.accumulated > 1:
        step["gradients"] = held.gradients + step.get("gradients", 0)  # one more for a moment
    buckets = held.gradients if workload.strategy == "ddp" else 0
    phases.append(_with("forward and backward", own, step, workspace=shared + buckets, host=held.host))
    taken = {"gradients": held.gradients, "workspace": held.step_workspace}
    phases.append(_with("optimizer step", own, taken, workspace=buckets, host=held.host))
    if not workload.adapter.whole_model:
        phases.append(Phase("merge", _merge(workload, held), held.host))
    written = min(SHARD, held.base) if workload.adapter.whole_model else held.adapter
    return (*phases, Phase("save", _parts(held), held.host + written))


def peak(phases: Iterable[Phase]) -> Phase:
    """Return the fullest phase."""
    return max(phases, key=lambda phase: phase.total)


def _loaded(workload: Workload, held: Resident) -> int:
    """Return the weights that a process has loaded, before quantized ones are parted.

    transformers 5.23 loads in parts what is not quantized; of 4-bit weights each process has all at first.
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
    """Return the part of a workload that one forward and backward pass depends on."""
    return replace(
        workload,
        optimizer="adamw",
        accumulated=min(workload.accumulated, 2),
        live_reference=False,
        scorers=0,
        rollout=None,
        processes=workload.processes if workload.strategy in PARTED_GRADIENTS else 1,
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
    """Return the fuller one of reading the prompts, and of writing the last token."""
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
    """Return what a merge holds: base, adapter, and the largest product of an adapter in float32."""
    largest = max(layer.inputs * layer.outputs for layer in workload.architecture.linear_layers())
    base = workload.architecture.parameters * workload.bytes
    return dict.fromkeys(PARTS, 0) | {"base": base, "adapter": held.adapter, "workspace": 2 * 4 * largest}
