"""Collectives: barrier, all-gather, broadcast, any-rank reduce, sharding of lists; no-ops on one process."""

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
"""How long a collective waits for a rank that evaluates or writes; one that died is reported at once."""
DEEPSPEED_SWITCH = "ACCELERATE_USE_DEEPSPEED"
"""The variable that Accelerate's own launcher sets for DeepSpeed; Accelerate's states read it."""
DEEPSPEED_DEVICE = "DS_ACCELERATOR"
"""The variable that selects DeepSpeed's device; it is read when DeepSpeed is first imported."""


def join(device: str, *, deepspeed: bool) -> World:
    """Initialize the process group; called before any collective.

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
        os.environ[DEEPSPEED_DEVICE] = "cpu"  # or DeepSpeed warns that it found no GPU
    backend: dict[str, Any] = {"backend": "gloo"} if device == "cpu" else {}
    # DeepSpeed on CPUs as Accelerate documents it: a gloo state that exists before the TrainingArguments,
    # which take it over (``use_configured_state``).
    with redirect_stdout(StringIO()):  # DeepSpeed prints what it compiled
        PartialState(cpu=device == "cpu" and not deepspeed, timeout=PATIENCE, **backend)
    assert PartialState().num_processes == place.size, "process group size != the launcher's world size"
    return place


def wait() -> None:
    """Block until every rank has reached this call."""
    if world().size > 1:
        PartialState().wait_for_everyone()


def everyones(value: Value) -> list[Value]:
    """Return every rank's value, in order of rank; it must be picklable."""
    return gather_object([value]) if world().size > 1 else [value]


def from_main(value: Value) -> Value:
    """Return rank 0's value on every rank; the value that other ranks pass is ignored."""
    if world().size == 1:
        return value
    found = [value]
    broadcast_object_list(found, from_process=0)
    return found[0]


def anyones(flag: bool) -> bool:
    """Return whether the flag is true on any rank (an all-reduce)."""
    if world().size == 1:
        return flag
    said = torch.tensor([float(flag)], device=PartialState().device)
    torch.distributed.all_reduce(said)
    return bool(said.item())


def share(items: Sequence[Value]) -> Sequence[Value]:
    """Return this rank's shard of a list: ``items[rank::world_size]``."""
    place = world()
    return items[place.rank :: place.size]


def share_in_step(items: Sequence[Value]) -> list[tuple[Value, bool]]:
    """Return this rank's shard as (item, is_real), padded with the first item to the longest shard."""
    # With sharded weights each forward pass is a collective (all-gather), so all ranks need as many of them.
    own = [(item, True) for item in share(items)]
    longest = -(-len(items) // world().size)
    return own + [(items[0], False)] * (longest - len(own))


def together(shares: Sequence[Sequence[Value]]) -> list[Value]:
    """Return the list that was sharded, in its original order, from the shards of all ranks."""
    size = len(shares)
    return [shares[index % size][index // size] for index in range(sum(map(len, shares)))]


def _name_place(place: World) -> None:
    """Set the variables that torch and Accelerate read; `srun` alone sets only SLURM's."""
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
    }
