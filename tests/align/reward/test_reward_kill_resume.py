"""kill -9 at any moment of a reward model's run: the same command goes on, to the same bits."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 12
RECIPE = """\
stage: reward
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, template: plain, held_out: 6, max_length: 64}}
adapter: {{method: {method}{more}}}
reward: {{centring: 0.01}}
train: {{max_steps: {steps}, batch_size: 6, micro_batch_size: 2, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 2}}
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    found = [
        {"prompt": f"Add the numbers. {i}", "chosen": f"good {'!' * (i % 9)}", "rejected": f"bad {i % 7}"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def recipe_of(method: str, more: str, base: Path, rows: Path) -> Path:
    path = rows.parent / f"{method}.yaml"
    path.write_text(RECIPE.format(base=base, rows=rows, method=method, more=more, steps=STEPS))
    return path


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "align", "reward", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finished(out: Path) -> dict[str, object]:
    """Return the checksums of what was trained, and what was measured of it."""
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert set(range(1, STEPS + 1)) <= set(steps)
    return {key: record[key] for key in ("files", "normalisation", "comparisons")}


def kill_at(recipe: Path, out: Path, lines: int, delay: float) -> None:
    """Kill the run some milliseconds after its metrics have grown to so many lines."""
    process = start(recipe, out)
    metrics = out / "metrics.jsonl"
    while process.poll() is None:
        grown = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        if (out / "run.json").is_file() and grown >= lines:
            time.sleep(delay)
            break
        time.sleep(0.002)
    process.kill()
    process.wait()


def check(recipe: Path, tmp_path: Path, seed: int) -> None:
    moment = random.Random(seed)
    whole, out = recipe.with_suffix(".whole"), tmp_path / "run"
    if not whole.is_dir():
        assert start(recipe, whole).wait() == 0
    for _ in range(2):
        kill_at(recipe, out, moment.randint(0, STEPS + 1), moment.uniform(0, 0.15))
    assert start(recipe, out).wait() == 0
    assert finished(out) == finished(whole)


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_reward_run_goes_on_bit_for_bit(
    rows: Path, base_folder: Path, tmp_path: Path, seed: int
) -> None:
    check(recipe_of("lora", ", rank: 4, dropout: 0.1", base_folder, rows), tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ptuning", "adalora", "adamix"])
@pytest.mark.parametrize("seed", range(2, 7))
def test_killed_reward_runs_of_more_adapters(
    rows: Path, base_folder: Path, tmp_path: Path, seed: int, method: str
) -> None:
    check(recipe_of(method, "", base_folder, rows), tmp_path, seed)
