"""The first eight steps of every quickstart, at a low rate, are those of the files here, to 1e-4.

``pytest tests/golden_losses --renew-golden`` writes them anew, for a change of numerics that is meant.
"""

import math
from pathlib import Path

import pytest
from golden_runs import CASES, FOLDER, STEPS, curves, differences, golden_run, read_golden, write_golden

from finetune.recipe.discovery import stage_names


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return the folder of the runs, one for all processes of the session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "golden"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_file(case: str, runs_folder: Path, request: pytest.FixtureRequest) -> None:
    found = curves(golden_run(case, runs_folder))
    if request.config.getoption("renew_golden"):
        write_golden(case, found)
    assert differences(read_golden(case), found) == []


@pytest.mark.parametrize("case", CASES)
def test_a_file_has_the_loss_of_each_step(case: str) -> None:
    golden = read_golden(case)
    assert len(golden["loss"]) == STEPS and len(golden["grad_norm"]) == STEPS
    assert set(golden["step"]) - {0} == set(range(1, STEPS + 1))
    assert all(norm > 0 for norm in golden["grad_norm"])


def test_every_stage_has_a_file() -> None:
    assert set(stage_names()) <= set(CASES)
    assert sorted(file.stem for file in FOLDER.glob("*.json")) == sorted(CASES)


def test_a_small_difference_is_found_and_rounding_is_not() -> None:
    golden = {"loss": [2.0, 1.0], "step": [1, 2]}
    assert differences(golden, {"loss": [2.0, 1.0001], "step": [1, 2]}) == []
    assert differences(golden, {"loss": [2.0, 1.001], "step": [1, 2]}) == [
        "loss: expected [2.0, 1.0], found [2.0, 1.001]"
    ]
    assert differences(golden, {"loss": [2.0], "step": [1, 2]}) == ["loss: expected [2.0, 1.0], found [2.0]"]
    assert differences(golden, {"step": [1, 2]}) == ["loss: only in one of both"]
    assert differences({"loss": [1.0]}, {"loss": [math.nan]}) == ["loss: expected [1.0], found [nan]"]
    rates = {"learning_rate": [5e-4]}
    assert differences(rates, {"learning_rate": [5.001e-4]}) != []
    assert differences({"loss": [1e-7]}, {"loss": [2e-7]}) == []
