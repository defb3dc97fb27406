"""kill -9 at any moment of a reward model run: the same command resumes, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from killed import STEPS, finished, killed_twice, uninterrupted

RECIPE = """\
stage: reward
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, template: plain, held_out: 6, max_length: 64}}
adapter: {{method: {method}{more}}}
reward: {{center_rewards_coefficient: 0.01}}
train: {{max_steps: {steps}, batch_size: 6, micro_batch_size: 2, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 2}}
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    comparisons = [
        {"prompt": f"Add the numbers. {i}", "chosen": f"good {'!' * (i % 9)}", "rejected": f"bad {i % 7}"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in comparisons))
    return path


def recipe_of(method: str, more: str, base: Path, rows: Path) -> Path:
    path = rows.parent / f"{method}.yaml"
    path.write_text(RECIPE.format(base=base, rows=rows, method=method, more=more, steps=STEPS))
    return path


def measured(out: Path) -> dict[str, Any]:
    """Return the score metrics of a finished run's record."""
    record = json.loads((out / "run.json").read_text())
    return {key: record[key] for key in ("reward_normalization", "preference_data")}


def check(recipe: Path, out: Path, seed: int) -> None:
    reference_run = recipe.with_suffix(".whole")
    if not reference_run.is_dir():
        uninterrupted(recipe, reference_run)
    assert killed_twice(recipe, out, seed) == finished(reference_run)
    assert measured(out) == measured(reference_run)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_reward_run_resumes_bit_for_bit(
    rows: Path, base_folder: Path, tmp_path: Path, seed: int
) -> None:
    check(recipe_of("lora", ", rank: 4, dropout: 0.1", base_folder, rows), tmp_path / "run", seed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ptuning", "adalora", "adamix"])
@pytest.mark.parametrize("seed", range(2, 7))
def test_killed_reward_runs_with_other_adapters(
    rows: Path, base_folder: Path, tmp_path: Path, seed: int, method: str
) -> None:
    check(recipe_of(method, "", base_folder, rows), tmp_path / "run", seed)
