"""What the processes of a run do together; a process that is alone does it with nobody."""

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from finetune.planning.world import World, world

Value = TypeVar("Value")

PATIENCE = timedelta(hours=2)
"""How long a process waits for another, which may measure or write; one that died is told at once."""
DEEPSPEED_SWITCH = "ACCELERATE_USE_DEEPSPEED"
"""What Accelerate's own launcher sets where DeepSpeed is to run; its states look for it."""
DEEPSPEED_DEVICE = "DS_ACCELERATOR"
"""What DeepSpeed is told of the device with, before it is first imported."""


def join(device: str, *, deepspeed: bool) -> World:
    """Meet the other processes of the run, before anything is computed together.

    DeepSpeed on CPUs is asked for as Accelerate documents it: a state on the backend gloo, made before the
    engine's arguments, which take it over (``use_configured_state``).

    Args:
        device: ``cpu`` or ``cuda``.
        deepspeed: whether ZeRO is the strategy.
    """
    place = world()
    if place.size == 1:
        return place
    _name_place(place)
    os.environ[DEEPSPEED_SWITCH] = str(deepspeed).lower()
    if device == "cpu":
        os.environ[DEEPSPEED_DEVICE] = "cpu"  # or DeepSpeed says that it found no GPU
    backend: dict[str, Any] = {"backend": "gloo"} if device == "cpu" else {}
    with redirect_stdout(StringIO()):  # DeepSpeed prints what it compiled
        PartialState(cpu=device == "cpu" and not deepspeed, timeout=PATIENCE, **backend)
    assert PartialState().num_processes == place.size, "the processes did not meet"
    return place


def wait() -> None:
    """Wait until every process is here."""
    if world().size > 1:
        PartialState().wait_for_everyone()


def everyones(value: Value) -> list[Value]:
    """Return the value of every process, in order of rank; it must be picklable."""
    return gather_object([value]) if world().size > 1 else [value]


def from_main(value: Value) -> Value:
    """Return rank 0's value; what the others hand in is not looked at."""
    if world().size == 1:
        return value
    found = [value]
    broadcast_object_list(found, from_process=0)
    return found[0]


def anyones(flag: bool) -> bool:
    """Tell whether any process says yes."""
    if world().size == 1:
        return flag
    said = torch.tensor([float(flag)], device=PartialState().device)
    torch.distributed.all_reduce(said)
    return bool(said.item())


def share(items: Sequence[Value]) -> Sequence[Value]:
    """Return the part of a list that is this process's: every size-th item, from its rank on."""
    place = world()
    return items[place.rank :: place.size]


def share_in_step(items: Sequence[Value]) -> list[tuple[Value, bool]]:
    """Return this process's part of a list as ``share``, as long as every other's: the last may not count.

    Weights that lie in parts are fetched by all processes together, so all compute equally often.
    """
    own = [(item, True) for item in share(items)]
    longest = -(-len(items) // world().size)
    return own + [(items[0], False)] * (longest - len(own))


def together(shares: Sequence[Sequence[Value]]) -> list[Value]:
    """Return what ``share`` took apart, in its order, from every process's part."""
    size = len(shares)
    return [shares[index % size][index // size] for index in range(sum(map(len, shares)))]


def _name_place(place: World) -> None:
    """Say it in the names that torch and Accelerate read; under SLURM's own launcher only SLURM's are set."""
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
    }
