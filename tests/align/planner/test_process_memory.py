"""Processes on the CPU that the machine's memory does not hold are refused before they start."""

from dataclasses import replace
from pathlib import Path

import pytest

from align.api import load_recipe
from align.planner.plan import make_plan
from align.planner.process_memory import oversubscription_note, process_memory_problems
from align.planner.terminal import format_bytes
from align.required_runs import plan_runs, resolve_required_runs
from finetune.distributed.hardware import GIB, GPUS, cpu_device
from finetune.recipe.console import Terminal
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe

CPU = replace(cpu_device(), memory=8 * GIB)


def small_recipe(folder: Path, **settings: int) -> Recipe:
    rows = [{"instruction": f"Add {i} and {i}.", "output": str(2 * i)} for i in range(20)]
    given = {f"train.{key}": value for key, value in settings.items()}
    given |= {"data.held_out": 2, "evaluate.exact_match": 0, "evaluate.graders": {}}
    return load_recipe("sft/quickstart", data=rows, out=folder / "run", settings=given)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small_recipe(tmp_path, batch_size=12, num_processes=12)


def test_the_problem_names_the_plan_s_bytes_and_a_number_that_fits(recipe: Recipe) -> None:
    [problem] = process_memory_problems(recipe, CPU, 12)
    each = make_plan(recipe, CPU, 1).peak.total + CPU.program_bytes
    assert f"12 processes need {format_bytes(each)} each" in problem.actual
    assert "8.0 GiB exist" in problem.actual
    # The largest divisor of the batch size: 8 GiB hold 9 of them.
    assert 9 <= 8 * GIB / each < 10
    assert problem.repair == "train.num_processes=6"
    assert process_memory_problems(recipe, CPU, 6) == []


@pytest.mark.parametrize(("processes", "device"), [(1, replace(CPU, memory=GIB)), (64, GPUS["t4"]), (4, CPU)])
def test_what_fits_or_shares_no_memory_is_taken(recipe: Recipe, processes: int, device: object) -> None:
    assert process_memory_problems(recipe, device, processes) == []  # type: ignore[arg-type]


def test_no_number_is_offered_where_none_fits(recipe: Recipe) -> None:
    [problem] = process_memory_problems(recipe, replace(CPU, memory=GIB // 2), 4)
    assert "llm-align plan" in problem.repair and "train.num_processes=" not in problem.repair


def test_a_run_asks_the_plan_and_a_dry_run_does_not(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, num_processes=100_000, batch_size=100_000)
    with pytest.raises(UserError, match="100000 processes need"):
        resolve_required_runs(recipe, Terminal(quiet=True))
    # A dry run is often for another machine.
    assert plan_runs(recipe, force=False)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_cores_are_noted() -> None:
    assert oversubscription_note(2, 2) == ""
    assert oversubscription_note(3, 2).startswith("train.num_processes=3 on 2 CPU cores")
