"""Rank and world size from the launchers' environment variables."""

import pytest

from finetune.distributed.rank import SINGLE_PROCESS, DistInfo, dist_info

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, SINGLE_PROCESS),
        (TORCHRUN, DistInfo(3, 8, 1)),
        (SRUN, DistInfo(5, 6, 2)),
        (TORCHRUN | SRUN, DistInfo(3, 8, 1)),  # torchrun inside a step of srun
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, SINGLE_PROCESS),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, SINGLE_PROCESS),
        ({"RANK": "3"}, SINGLE_PROCESS),
    ],
)
def test_the_place_is_what_the_launcher_says(environment: dict[str, str], place: DistInfo) -> None:
    assert dist_info(environment) == place
    assert place.is_main == (place.rank == 0)
