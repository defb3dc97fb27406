"""kill -9 at any moment of a pipeline: the same command resumes, and every adapter is bit-identical."""

import random
import subprocess
import time
from pathlib import Path

import pytest
import warm
from small_pipelines import COMMAND, record, weights, write_recipes, write_rlhf

LEARNT = [*COMMAND[:-1], "rlhf"]


def killed(folder: Path, seconds: float, command: list[str]) -> None:
    """Kill a run of a pipeline after some seconds, if it takes so long."""
    process = warm.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def after_kills(
    folder: Path, seed: int, longest: float, command: list[str] = COMMAND
) -> dict[str, dict[str, str]]:
    """Return the checksums of a pipeline that was killed at two moments and started again."""
    moment = random.Random(seed)
    for _ in range(2):
        killed(folder, moment.uniform(0.2 * longest, longest), command)
    assert warm.run(command, cwd=folder, capture_output=True).returncode == 0
    assert record(folder)["status"] == "finished"
    return weights(folder)


def killed_in(folder: Path, stage: str) -> None:
    """Kill a run of the pipeline after a stage's first training step."""
    process = warm.Popen(COMMAND, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.glob(f"runs/{stage}-small-*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_pain_05_a_pipeline_killed_twice_ends_alike(here: Path, finished: Path) -> None:
    killed_in(here, "sft")
    killed_in(here, "dpo")
    assert record(here)["status"] == record(here)["stages"]["dpo"]["status"] == "running"
    ended = warm.run(COMMAND, cwd=here, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.count("already finished: ") == 2
    assert weights(here) == weights(finished)


@pytest.fixture(scope="module")
def seconds(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, rows_file: Path) -> float:
    """Return how long the pipeline takes here."""
    folder = tmp_path_factory.mktemp("measured")
    write_recipes(folder, base_folder, rows_file)
    began = time.monotonic()
    warm.run(COMMAND, cwd=folder, capture_output=True, check=True)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_pipeline_killed_at_any_moment_ends_alike(
    here: Path, finished: Path, seconds: float, seed: int
) -> None:
    assert after_kills(here, seed, seconds) == weights(finished)


@pytest.fixture(scope="module")
def learnt(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path, rows_file: Path
) -> tuple[dict[str, dict[str, str]], float]:
    """Return the checksums of a pipeline with PPO that nobody killed, and how long it took."""
    folder = tmp_path_factory.mktemp("learnt")
    write_recipes(folder, base_folder, rows_file)
    write_rlhf(folder, base_folder)
    began = time.monotonic()
    warm.run(LEARNT, cwd=folder, capture_output=True, check=True)
    return weights(folder), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_pain_06_rlhf_killed_at_any_moment_ends_alike(
    here: Path, base_folder: Path, learnt: tuple[dict[str, dict[str, str]], float], seed: int
) -> None:
    expected, seconds = learnt
    write_rlhf(here, base_folder)
    assert after_kills(here, seed, seconds, LEARNT) == expected
