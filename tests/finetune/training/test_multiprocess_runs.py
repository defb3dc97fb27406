"""Two processes on the CPU: the same losses and weights as one, with every strategy."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import warm
from fixture_types import MakeRecipe
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from finetune.recipe.errors import UserError
from finetune.training.launch import launch_stage
from finetune.training.result import Result

QUIET = Console(quiet=True)
UNEVEN: dict[str, Any] = {
    "train__batch_size": 5,
    "train__micro_batch_size": 2,
    "train__max_steps": 10,
    # A low rate: rounding differs between numbers of processes, and a high one amplifies it.
    "train__learning_rate": 1e-3,
}
"""42 rows: an odd batch, and a last one of two rows, so that ranks have shards of unequal size."""


@pytest.fixture(autouse=True)
def _warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess_handler, "Popen", warm.Popen)


def run_on_processes(
    make_recipe: MakeRecipe, name: str, num_processes: int, strategy: str = "auto", **settings: Any
) -> Result:
    recipe = make_recipe(name, train__num_processes=num_processes, train__strategy=strategy, **settings)
    return launch_stage(recipe, QUIET, command="a test")


def assert_close_runs(expected_run: Result, other_run: Result, *, error: float = 1e-4) -> None:
    """Compare losses and gradients step by step, held-out losses, and the saved adapters."""
    assert len(expected_run.metrics) == len(other_run.metrics)
    for first, second in zip(expected_run.metrics, other_run.metrics, strict=True):
        for key in ("loss", "grad_norm", "eval/loss", "eval/suites/mine"):
            assert math.isclose(first.get(key, 0), second.get(key, 0), rel_tol=error), (first, second)
    for key in ("eval/loss_before", "eval/loss_after", "eval/suites/mine_before", "eval/suites/mine_after"):
        assert math.isclose(
            expected_run.record["metrics"][key], other_run.record["metrics"][key], rel_tol=error
        )
    saved, expected = (
        load_file(run.adapter / "adapter_model.safetensors") for run in (other_run, expected_run)
    )
    assert saved.keys() == expected.keys()
    assert all(saved[name].any() for name in saved)
    # Adam normalizes gradients: nearly zero ones may step in either direction.
    assert max(float((saved[name] - expected[name]).abs().max()) for name in saved) < 2e-3


@pytest.fixture
def uneven(tmp_path: Path) -> dict[str, Any]:
    """Return the settings, with a suite of three texts: ranks have unequal numbers of items."""
    rows = [{"text": text} for text in ("Mina has a red ball.", "Tom is sad.", "연은 빨갛습니다.")]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    suite = tmp_path / "mine.yaml"
    suite.write_text("description: mine\ntask: perplexity\ndata: {source: texts.jsonl}\n", encoding="utf-8")
    return {**UNEVEN, "evaluate__suites": [str(suite)], "train__evaluate_every": 4}


@pytest.fixture
def single_process_run(make_recipe: MakeRecipe, uneven: dict[str, Any]) -> Result:
    return run_on_processes(make_recipe, "one", 1, **uneven)


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.slow),
        "zero3",
        "fsdp2",
    ],
)
def test_two_processes_match_one(
    make_recipe: MakeRecipe, single_process_run: Result, uneven: dict[str, Any], strategy: str
) -> None:
    two = run_on_processes(make_recipe, "two", 2, strategy, **uneven)
    between = [entry for entry in single_process_run.metrics if "eval/suites/mine" in entry]
    assert between, "evaluated each time that the held-out loss is"
    assert len(between) == sum("eval/loss" in entry for entry in single_process_run.metrics)
    assert_close_runs(single_process_run, two)
    assert two.record["processes"] == 2 and two.record["status"] == "finished"
    assert two.samples == single_process_run.samples
    checks = {check["name"] for check in two.record["preflight"]}
    assert {"first steps", "base", "saved"} <= checks


def test_a_data_error_of_a_worker_is_raised(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": 3}\n', encoding="utf-8")
    with pytest.raises(UserError) as error:
        run_on_processes(make_recipe, "bad", 2, data__source=str(rows))
    assert "rows.jsonl:1" in str(error.value) and error.value.problems[0].expected
    assert not (tmp_path / "bad" / "run.json").exists()


def test_sharding_with_one_process_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.strategy .*: zero2, with 1 process"):
        run_on_processes(make_recipe, "single", 1, "zero2")
    assert not (tmp_path / "single" / "run.json").exists()


def test_a_finished_run_starts_no_workers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = run_on_processes(make_recipe, "run", 1)
    (tmp_path / "run" / "run.json").write_text(json.dumps(first.record | {"mark": 1}), encoding="utf-8")
    repeated = run_on_processes(make_recipe, "run", 2)
    assert repeated.record["mark"] == 1
