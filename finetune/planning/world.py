"""Which of a run's processes this one is, as every launcher tells it; nothing heavy is imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class World:
    """A process of a run: its number, how many there are, its number on its own machine."""

    rank: int
    size: int
    local_rank: int

    @property
    def main(self) -> bool:
        """Tell whether this process writes and speaks for all."""
        return self.rank == 0


ALONE = World(0, 1, 0)


def world(environment: Mapping[str, str] = os.environ) -> World:
    """Return this process's place: what torchrun, `accelerate launch`, `deepspeed` and our launcher set.

    Under `srun` without a launcher the variables are SLURM's; a step of one task is no world.
    """
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if all(name in environment for name in (rank, size, local)) and int(environment[size]) > 1:
            return World(int(environment[rank]), int(environment[size]), int(environment[local]))
    return ALONE
