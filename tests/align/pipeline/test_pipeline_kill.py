"""kill -9 at any moment of a pipeline: the same command goes on, and every adapter is the same to the bit."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_pipelines import record, weights, write_recipes

COMMAND = [sys.executable, "-m", "align", "run", "three"]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path, rows_file: Path
) -> tuple[dict[str, dict[str, str]], float]:
    """Return the checksums of a pipeline that nobody killed, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipes(folder, base_folder, rows_file)
    began = time.monotonic()
    assert subprocess.run(COMMAND, cwd=folder, capture_output=True).returncode == 0
    return weights(folder), time.monotonic() - began


def killed(folder: Path, seconds: float) -> None:
    """Kill a run of the pipeline after some seconds, if it takes so long."""
    process = subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def after_kills(folder: Path, seed: int, longest: float) -> dict[str, dict[str, str]]:
    """Return the checksums of a pipeline that was killed at two moments and started again."""
    moment = random.Random(seed)
    for _ in range(2):
        killed(folder, moment.uniform(0.2 * longest, longest))
    assert subprocess.run(COMMAND, cwd=folder, capture_output=True).returncode == 0
    assert record(folder)["status"] == "finished"
    return weights(folder)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))]
)
def test_pain_05_a_killed_pipeline_ends_alike(
    here: Path, whole: tuple[dict[str, dict[str, str]], float], seed: int
) -> None:
    expected, seconds = whole
    assert after_kills(here, seed, seconds) == expected


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_kill_in_every_stage(
    here: Path, whole: tuple[dict[str, dict[str, str]], float], stage: str
) -> None:
    process = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(here.glob(f"runs/{stage}-small-*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert subprocess.run(COMMAND, capture_output=True).returncode == 0
    assert weights(here) == whole[0]
