"""kill -9 at any moment of a rejection run: the same command resumes, bit for bit."""

import json
import random
import time
from pathlib import Path

import pytest
from killed import STEPS, finished, start, uninterrupted

ROUNDS = 2
RECIPE = """\
stage: rejection
model: {{base: {base}, precision: float32}}
data: {{source: {folder}/prompts.jsonl, held_out: 4, template: alpaca, cache: false}}
adapter: {{method: {method}, {more}}}
train: {{max_steps: {steps}, batch_size: 4, micro_batch_size: 3, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 1, max_new_tokens: 4}}
rewards: {{sources: "{folder}/mine.py:letters"}}
sampling: {{max_new_tokens: 8}}
rejection: {{rounds: {rounds}, prompts: 8, num_generations: 2, truncated: train}}
"""
PROGRAM = """\
def letters(prompt, completion):
    return sum(letter in "aeiou" for letter in completion) - len(completion) / 10
"""
MOMENTS = STEPS + 2 * ROUNDS
"""Lines of metrics, files of drawn replies, and rounds that are finished."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rejection")
    rows = [{"prompt": f"Add the numbers. {i} {i % 3}"} for i in range(20)]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "mine.py").write_text(PROGRAM)
    return path


def recipe_of(method: str, more: str, base: Path, folder: Path) -> Path:
    path = folder / f"{method}.yaml"
    steps = STEPS // ROUNDS
    path.write_text(
        RECIPE.format(base=base, folder=folder, method=method, more=more, steps=steps, rounds=ROUNDS)
    )
    return path


def done(out: Path) -> int:
    """Return how far a run is."""
    num_entries = sum(file.read_bytes().count(b"\n") for file in out.glob("rounds/*/metrics.jsonl"))
    return (
        num_entries + len(list(out.glob("drawn/*.safetensors"))) + len(list(out.glob("rounds/*/report.html")))
    )


def kill_at(recipe: Path, out: Path, moment: int, delay: float) -> None:
    process = start(recipe, out)
    while process.poll() is None:
        if (out / "run.json").is_file() and done(out) >= moment:
            time.sleep(delay)
            break
        time.sleep(0.002)
    process.kill()
    process.wait()


def check(recipe: Path, out: Path, seed: int) -> None:
    reference_run = recipe.with_suffix(".whole")
    if not reference_run.is_dir():
        uninterrupted(recipe, reference_run)
    moment = random.Random(seed)
    for _ in range(2):
        kill_at(recipe, out, moment.randint(0, MOMENTS), moment.uniform(0, 0.15))
    assert start(recipe, out).wait() == 0
    assert finished(out) == finished(reference_run)
    for name in ("chosen.jsonl", "metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "held_out.jsonl"):
        assert (out / name).read_bytes() == (reference_run / name).read_bytes(), name
    records = [json.loads((path / "run.json").read_text()) for path in (out, reference_run)]
    assert records[0]["rounds"] == records[1]["rounds"]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rejection_run_resumes_bit_for_bit(
    folder: Path, base_folder: Path, tmp_path: Path, seed: int
) -> None:
    check(recipe_of("lora", "rank: 4, dropout: 0.1", base_folder, folder), tmp_path / "run", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize(
    ("method", "more"),
    [("lora", "rank: 4, dropout: 0.1"), ("prefix", "virtual_tokens: 4"), ("pissa", "rank: 4")],
)
def test_rejection_runs_resume_at_more_moments(
    method: str, more: str, seed: int, folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    check(recipe_of(method, more, base_folder, folder), tmp_path / "run", seed)
