"""Rank, world size and local rank of this process, from the launcher's environment; no heavy imports."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DistInfo:
    """Rank, world size and local rank of one process of a run."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0


SINGLE_PROCESS = DistInfo(0, 1, 0)


def dist_info(environment: Mapping[str, str] = os.environ) -> DistInfo:
    """Return the rank and world size that torchrun, `accelerate launch`, `deepspeed` or our launcher set.

    Under `srun` without a launcher the variables are SLURM's.
    """
    # A SLURM job step with one task sets these variables too, but is an ordinary single-process run.
    for rank, world_size, local_rank in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if (
            all(name in environment for name in (rank, world_size, local_rank))
            and int(environment[world_size]) > 1
        ):
            return DistInfo(
                int(environment[rank]), int(environment[world_size]), int(environment[local_rank])
            )
    return SINGLE_PROCESS
