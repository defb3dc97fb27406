"""Rank and world size from the launchers' environment variables."""

import pytest

from finetune.planning.world import ALONE, World, world

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ALONE),
        (TORCHRUN, World(3, 8, 1)),
        (SRUN, World(5, 6, 2)),
        (TORCHRUN | SRUN, World(3, 8, 1)),  # torchrun inside a step of srun
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, ALONE),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ALONE),
        ({"RANK": "3"}, ALONE),
    ],
)
def test_the_place_is_what_the_launcher_says(environment: dict[str, str], place: World) -> None:
    assert world(environment) == place
    assert place.main == (place.rank == 0)
