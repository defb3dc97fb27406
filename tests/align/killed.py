"""Runs of the command line that are killed, and what they must leave when they are started again."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import warm

from align import load_recipe, run

STEPS = 18


def command_line(recipe: Path, out: Path) -> list[str]:
    """Return the command that runs a recipe."""
    return [sys.executable, "-m", "align", stage_of(recipe), str(recipe), "--out", str(out)]


def stage_of(recipe: Path) -> str:
    """Return the stage that a recipe's first line names."""
    return recipe.read_text().split("\n", 1)[0].removeprefix("stage: ")


def start(recipe: Path, out: Path) -> warm.Popen:
    return warm.Popen(command_line(recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def uninterrupted(recipe: Path, out: Path) -> dict[str, str]:
    """Return the checksums of an uninterrupted run in this process, which has another hash seed."""
    run(load_recipe(str(recipe), stage=stage_of(recipe), out=out))
    return finished(out)


def finished(out: Path) -> dict[str, str]:
    """Return the checksums of what was trained."""
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if steps.count(step) > 1] == [], "a step was logged twice"
    assert set(range(1, STEPS + 1)) <= set(steps)
    files: dict[str, str] = record["files"]
    # Of RL: each sampled completion once.
    rollouts = out / "rollouts.jsonl"
    return files | ({rollouts.name: rollouts.read_text()} if rollouts.is_file() else {})


def kill_at(recipe: Path, out: Path, lines: int, delay: float) -> None:
    """Kill the run some milliseconds after its metrics have grown to so many lines."""
    process = start(recipe, out)
    metrics = out / "metrics.jsonl"
    while process.poll() is None:
        if (out / "run.json").is_file() and (lines == 0 or (metrics.is_file() and count(metrics) >= lines)):
            time.sleep(delay)
            break
        time.sleep(0.002)
    process.kill()
    process.wait()


def count(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n")


def killed_twice(recipe: Path, out: Path, seed: int) -> dict[str, str]:
    """Return the checksums of a run that was killed at two moments and started again."""
    moment = random.Random(seed)
    for _ in range(2):
        kill_at(recipe, out, moment.randint(0, STEPS + 1), moment.uniform(0, 0.15))
    assert start(recipe, out).wait() == 0
    return finished(out)
