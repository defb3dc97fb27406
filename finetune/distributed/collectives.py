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

from finetune.distributed.rank import DistInfo, dist_info

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""How long a collective waits for a rank that evaluates or writes; the launcher ends the run if one dies."""
USE_DEEPSPEED_ENV = "ACCELERATE_USE_DEEPSPEED"
"""The variable that Accelerate's own launcher sets for DeepSpeed; Accelerate's states read it."""
DEEPSPEED_DEVICE_ENV = "DS_ACCELERATOR"
"""The variable that selects DeepSpeed's device; it is read when DeepSpeed is first imported."""


def init_distributed(device: str, *, deepspeed: bool) -> DistInfo:
    """Initialize the process group; called before any collective.

    Args:
        device: ``cpu`` or ``cuda``.
        deepspeed: whether ZeRO is the strategy.
    """
    dist = dist_info()
    if dist.world_size == 1:
        return dist
    _export_rank_variables(dist)
    os.environ[USE_DEEPSPEED_ENV] = str(deepspeed).lower()
    if device == "cpu":
        os.environ[DEEPSPEED_DEVICE_ENV] = "cpu"  # or DeepSpeed warns that it found no GPU
    backend: dict[str, Any] = {"backend": "gloo"} if device == "cpu" else {}
    # As Accelerate documents DeepSpeed on CPUs: the gloo group exists before the TrainingArguments, which
    # reuse this state (``use_configured_state``).
    with redirect_stdout(StringIO()):  # DeepSpeed prints what it compiled
        # With cpu=True Accelerate would choose plain CPU processes and ignore DeepSpeed.
        PartialState(cpu=device == "cpu" and not deepspeed, timeout=TIMEOUT, **backend)
    assert PartialState().num_processes == dist.world_size, "process group size != the launcher's world size"
    return dist


def barrier() -> None:
    """Block until every rank has reached this call."""
    if dist_info().world_size > 1:
        PartialState().wait_for_everyone()


def all_gather_object(value: T) -> list[T]:
    """Return every rank's value, in order of rank; it must be picklable."""
    return gather_object([value]) if dist_info().world_size > 1 else [value]


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank; the value that other ranks pass is ignored."""
    if dist_info().world_size == 1:
        return value
    # Accelerate broadcasts in place, into the elements of a list.
    objects = [value]
    broadcast_object_list(objects, from_process=0)
    return objects[0]


def any_rank(flag: bool) -> bool:
    """Return whether the flag is true on any rank (an all-reduce)."""
    if dist_info().world_size == 1:
        return flag
    # On the process's own device: NCCL reduces no CPU tensors.
    count = torch.tensor([float(flag)], device=PartialState().device)
    torch.distributed.all_reduce(count)
    return bool(count.item())


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's shard of a list: ``items[rank::world_size]``."""
    dist = dist_info()
    return items[dist.rank :: dist.world_size]


def shard_padded(items: Sequence[T]) -> list[tuple[T, bool]]:
    """Return this rank's shard as (item, is_real), padded with the first item to the longest shard."""
    # With sharded weights each forward pass is a collective (all-gather), so all ranks need as many of them.
    shard_items = [(item, True) for item in shard(items)]
    shard_size = -(-len(items) // dist_info().world_size)
    return shard_items + [(items[0], False)] * (shard_size - len(shard_items))


def unshard(shards: Sequence[Sequence[T]]) -> list[T]:
    """Return the list that was sharded, in its original order, from the shards of all ranks."""
    world_size = len(shards)
    return [shards[index % world_size][index // world_size] for index in range(sum(map(len, shards)))]


def _export_rank_variables(dist: DistInfo) -> None:
    """Set the variables that torch and Accelerate read; `srun` alone sets only SLURM's."""
    os.environ |= {
        "RANK": str(dist.rank),
        "WORLD_SIZE": str(dist.world_size),
        "LOCAL_RANK": str(dist.local_rank),
    }
