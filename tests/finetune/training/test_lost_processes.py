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
SIZES = ["train.batch_size=5", "train.micro_batch_size=2", "train.checkpoint_every=3"]


def command(recipe_file: Path, out: Path, processes: int) -> list[str]:
    words = ["-m", "align", "sft", str(recipe_file), "--out", str(out), f"train.processes={processes}"]
    return [sys.executable, *words, f"train.max_steps={STEPS}", *SIZES]


def begin(recipe_file: Path, out: Path, processes: int, forks: bool) -> warm.Popen:
    """Start a run and return it when its fifth step is logged."""
    words, pipe = command(recipe_file, out, processes), subprocess.PIPE
    started = warm.Popen(words, stdout=pipe, stderr=subprocess.STDOUT, text=True, forks=forks)
    metrics, until = out / "metrics.jsonl", time.monotonic() + LIMIT
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert started.poll() is None and time.monotonic() < until, started.communicate()[0]
        time.sleep(0.02)
    return started


def finish(recipe_file: Path, out: Path, processes: int) -> str:
    done = warm.run(
        command(recipe_file, out, processes), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def whole(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(recipe_file, out, 1)
    return out


def same(out: Path, whole: Path) -> None:
    assert losses(out) == pytest.approx(losses(whole), rel=1e-3)
    mine, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (out, whole))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-2


def workers(started: warm.Popen) -> dict[int, psutil.Process]:
    """Return a run's worker processes by rank."""
    children = psutil.Process(started.pid).children(recursive=True)
    return {int(one.environ()["RANK"]): one for one in children if "RANK" in one.environ()}


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_stopped_run_goes_on_with_other_processes(
    recipe_file: Path, tmp_path: Path, whole: Path, first: int, then: int
) -> None:
    out = tmp_path / "run"
    started = begin(recipe_file, out, first, forks=True)
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=LIMIT)[0]
    assert started.returncode == 130 and "Run the same command to resume" in said, said
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert "resuming from step" in finish(recipe_file, out, then)
    same(out, whole)


def test_a_killed_process_ends_the_others_and_the_message_names_it(
    recipe_file: Path, tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "run"
    started = begin(recipe_file, out, 2, forks=False)
    found = workers(started)
    assert sorted(found) == [0, 1]
    found[1].kill()
    said = started.communicate(timeout=LIMIT)[0]
    assert started.returncode == 1, said
    assert f"process 1 (pid {found[1].pid}) was killed by SIGKILL" in said
    assert "run the same command to resume from the last checkpoint" in said
    assert not any(one.is_running() for one in found.values())
    finish(recipe_file, out, 2)
    same(out, whole)


def test_processes_end_with_the_one_that_started_them(recipe_file: Path, tmp_path: Path) -> None:
    started = begin(recipe_file, tmp_path / "run", 2, forks=False)
    found = list(workers(started).values())
    os.kill(started.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(found, timeout=LIMIT)
    assert len(gone) == 2 and not alive
