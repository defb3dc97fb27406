"""The most memory that each phase of a run holds, in bytes, from shapes alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune.planning.activations import forward_backward
from finetune.planning.caches import rollout, scoring
from finetune.planning.resident import Resident, resident
from finetune.planning.workload import Workload

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

    Raises:
        UserError: an adapter whose size is not known here.
    """
    held = resident(workload)
    phases = [Phase("load", _parts(held), held.host)]
    if workload.rollout is not None:
        phases.append(_with("rollout", held, rollout(workload)))
        phases.append(_with("score", held, scoring(workload)))
    elif workload.live_reference:
        phases.append(_with("score", held, scoring(workload)))
    phases.append(_with("forward and backward", held, forward_backward(workload, held)))
    step = {"gradients": held.gradients, "workspace": held.step_workspace}
    phases.append(_with("optimizer step", held, step))
    if not workload.adapter.whole_model:
        phases.append(Phase("merge", _merge(workload, held), held.host))
    phases.append(Phase("save", _parts(held), held.host + held.adapter))
    return tuple(phases)


def peak(phases: Iterable[Phase]) -> Phase:
    """Return the fullest phase."""
    return max(phases, key=lambda phase: phase.total)


def _parts(held: Resident) -> dict[str, int]:
    own = {"base": held.base, "adapter": held.adapter, "optimizer": held.optimizer}
    return dict.fromkeys(PARTS, 0) | own


def _with(name: str, held: Resident, added: Mapping[str, int]) -> Phase:
    return Phase(name, _parts(held) | dict(added), held.host)


def _merge(workload: Workload, held: Resident) -> dict[str, int]:
    """Return what a merge holds: base and adapter, and the largest product of an adapter in float32."""
    largest = max(layer.inputs * layer.outputs for layer in workload.architecture.linear_layers())
    base = workload.architecture.parameters * workload.bytes
    return dict.fromkeys(PARTS, 0) | {"base": base, "adapter": held.adapter, "workspace": 2 * 4 * largest}
