"""Multi-process runs that end early, by a signal or a dead process, and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm
from safetensors.torch import load_file

LIMIT = 120
STEPS = 60
# A low rate: rounding differs between numbers of processes, and 60 steps at a high rate amplify it.
SIZES = [
    "train.batch_size=5",
    "train.micro_batch_size=2",
    "train.checkpoint_every=3",
    "train.learning_rate=1e-3",
]


def command(recipe_file: Path, out: Path, processes: int) -> list[str]:
    words = ["-m", "align", "sft", str(recipe_file), "--out", str(out), f"train.num_processes={processes}"]
    return [sys.executable, *words, f"train.max_steps={STEPS}", *SIZES]


def start_run(recipe_file: Path, out: Path, processes: int, forks: bool) -> warm.Popen:
    """Start a run and return it when its fifth step is logged."""
    words, pipe = command(recipe_file, out, processes), subprocess.PIPE
    started = warm.Popen(words, stdout=pipe, stderr=subprocess.STDOUT, text=True, forks=forks)
    metrics, until = out / "metrics.jsonl", time.monotonic() + LIMIT
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert started.poll() is None and time.monotonic() < until, started.communicate()[0]
        time.sleep(0.02)
    return started


def run_to_end(recipe_file: Path, out: Path, processes: int) -> str:
    done = warm.run(
        command(recipe_file, out, processes), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(out: Path) -> list[float]:
    entries = [json.loads(entry) for entry in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    return [entry["loss"] for entry in entries]


@pytest.fixture(scope="module")
def uninterrupted(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run_to_end(recipe_file, out, 1)
    return out


def assert_equal_runs(out: Path, uninterrupted: Path) -> None:
    assert losses(out) == pytest.approx(losses(uninterrupted), rel=1e-3)
    resumed_weights, expected_weights = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (out, uninterrupted)
    )
    assert (
        max(float((resumed_weights[name] - expected_weights[name]).abs().max()) for name in resumed_weights)
        < 1e-2
    )


def workers(started: warm.Popen) -> dict[int, psutil.Process]:
    """Return a run's worker processes by rank."""
    children = psutil.Process(started.pid).children(recursive=True)
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_with_another_number_of_processes(
    recipe_file: Path, tmp_path: Path, uninterrupted: Path, first: int, then: int
) -> None:
    out = tmp_path / "run"
    started = start_run(recipe_file, out, first, forks=True)
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=LIMIT)[0]
    assert started.returncode == 130 and "Run the same command to resume" in output, output
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert "resuming from step" in run_to_end(recipe_file, out, then)
    assert_equal_runs(out, uninterrupted)


def test_a_killed_worker_stops_the_others_and_is_named(
    recipe_file: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "run"
    started = start_run(recipe_file, out, 2, forks=False)
    by_rank = workers(started)
    assert sorted(by_rank) == [0, 1]
    by_rank[1].kill()
    output = started.communicate(timeout=LIMIT)[0]
    assert started.returncode == 1, output
    assert f"process 1 (pid {by_rank[1].pid}) was killed by SIGKILL" in output
    assert "run the same command to resume from the last checkpoint" in output
    assert not any(process.is_running() for process in by_rank.values())
    run_to_end(recipe_file, out, 2)
    assert_equal_runs(out, uninterrupted)


@pytest.mark.slow
def test_workers_exit_with_the_launcher(recipe_file: Path, tmp_path: Path) -> None:
    started = start_run(recipe_file, tmp_path / "run", 2, forks=False)
    running = list(workers(started).values())
    os.kill(started.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(running, timeout=LIMIT)
    assert len(gone) == 2 and not alive
