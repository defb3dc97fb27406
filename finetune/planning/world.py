"""Rank, world size and local rank of this process, from the launcher's environment; no heavy imports."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class World:
    """Rank, world size and local rank of one process of a run."""

    rank: int
    size: int
    local_rank: int

    @property
    def main(self) -> bool:
        """Return whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0


ALONE = World(0, 1, 0)


def world(environment: Mapping[str, str] = os.environ) -> World:
    """Return the rank and world size that torchrun, `accelerate launch`, `deepspeed` or our launcher set.

    Under `srun` without a launcher the variables are SLURM's.
    """
    # A SLURM job step of one task sets its variables too, but is an ordinary single-process run.
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if all(name in environment for name in (rank, size, local)) and int(environment[size]) > 1:
            return World(int(environment[rank]), int(environment[size]), int(environment[local]))
    return ALONE
