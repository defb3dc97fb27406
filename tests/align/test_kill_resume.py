"""kill -9 at any moment: the same command resumes, and the adapter is bit-identical."""

import json
import time
from pathlib import Path

import pytest
import warm
from killed import STEPS, command_line, count, finished, kill_at, killed_twice, start
from killed import uninterrupted as whole

RECIPE = """\
stage: sft
model: {{base: {base}, precision: float32}}
data:
  mix: [{{source: {rows}, weight: 3}}, {{source: {rows}, select: {{rows: 30, rows_by: length}}, weight: 1}}]
  epoch_rows: 80
  held_out: 6
  packing: true
  max_length: 128
adapter: {{method: lora, rank: 4, dropout: 0.1}}
train: {{max_steps: {steps}, batch_size: 8, micro_batch_size: 3, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 2, max_new_tokens: 4}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, rows_file: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "killed.yaml"
    path.write_text(RECIPE.format(base=base_folder, rows=rows_file, steps=STEPS))
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return whole(recipe, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_pain_05_resume_after_kill_is_bit_for_bit(
    recipe: Path, uninterrupted: dict[str, str], tmp_path: Path, seed: int
) -> None:
    assert killed_twice(recipe, tmp_path / "run", seed) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 20))
def test_resume_at_eighteen_more_moments(
    recipe: Path, uninterrupted: dict[str, str], tmp_path: Path, seed: int
) -> None:
    assert killed_twice(recipe, tmp_path / "run", seed) == uninterrupted


def test_a_corrupt_checkpoint_is_reported_and_the_previous_one_used(
    recipe: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    kill_at(recipe, out, 9, 0.0)
    newest = max(
        (out / "checkpoints").glob("checkpoint-*/checksums.json"), key=lambda p: int(p.parent.name[11:])
    )
    weights = newest.parent / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    output = warm.run(command_line(recipe, out), capture_output=True, text=True, check=True).stdout
    assert f"{newest.parent}: adapter_model.safetensors: checksum mismatch" in output
    step = int(newest.parent.name[11:]) - 2
    assert f"resuming from step {step}" in output
    assert finished(out) == uninterrupted


def test_sigterm_leaves_a_checkpoint_and_status_130(
    recipe: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(recipe, out)
    while not (out / "metrics.jsonl").is_file() or count(out / "metrics.jsonl") < 4:
        time.sleep(0.002)
        assert process.poll() is None
    process.terminate()
    assert process.wait() == 130
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert start(recipe, out).wait() == 0
    assert finished(out) == uninterrupted
