"""kill -9 during preference training: the resumed adapter is bit-identical."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from killed import STEPS, killed_twice
from killed import uninterrupted as unkilled

Whole = Callable[[str], dict[str, str]]
RECIPE = """\
stage: dpo
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 6, max_length: 128, cache: {cache}}}
adapter: {{method: lora, rank: 4, dropout: 0.1}}
dpo: {{reference: {reference}}}
train: {{max_steps: {steps}, batch_size: 8, micro_batch_size: 3, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 2, max_new_tokens: 4}}
"""
WAYS = {"kept": ("precomputed", "true"), "computed again": ("precomputed", "false"), "live": ("live", "true")}
"""How the reference is had after a kill: from the cache, in another pass, or in every step."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": f"Add the numbers. {i} {i % 7}", "chosen": f"{i + i % 7}", "rejected": f"numbers {i + 9}"}
        for i in range(48)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, pairs: Path) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("recipes"), {}
    for name, (reference, kept) in WAYS.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.yaml"
        paths[name].write_text(
            RECIPE.format(base=base_folder, rows=pairs, cache=kept, reference=reference, steps=STEPS)
        )
    return paths


@pytest.fixture(scope="module")
def uninterrupted(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a function that returns the checksums of an uninterrupted run."""

    @cache
    def whole(name: str) -> dict[str, str]:
        return unkilled(recipes[name], tmp_path_factory.mktemp("whole") / "run")

    return whole


def test_pain_05_preferences_resume_after_kill_bit_for_bit(
    recipes: dict[str, Path], uninterrupted: Whole, tmp_path: Path
) -> None:
    found = killed_twice(recipes["computed again"], tmp_path / "run", seed=0)
    assert found == uninterrupted("computed again")


def test_the_reference_mode_does_not_change_the_result(uninterrupted: Whole) -> None:
    assert uninterrupted("kept") == uninterrupted("computed again")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("name", WAYS)
def test_preferences_resume_at_more_moments(
    recipes: dict[str, Path],
    uninterrupted: Whole,
    tmp_path: Path,
    name: str,
    seed: int,
) -> None:
    assert killed_twice(recipes[name], tmp_path / "run", seed) == uninterrupted(name)
