"""The compatibility matrix is correct: cells marked as working train three steps on two CPU ranks."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from cells import World, name_of, run, run_at_once

from finetune.planning.compatibility import WEIGHTS_APART
from finetune.planning.matrix import across, cells
from finetune.planning.solver import OFFLOADS, OPTIMIZERS, STRATEGIES, Combination, judge
from finetune.recipe.discovery import stage_names

ELSEWHERE = ("adalora", "bitfit", "full", "lora", "loftq", "pissa", "prefix", "prompt", "ptuning")
"""Adapters that every stage runs, one of each kind; stage sft runs all, with every quantization."""
LORA = Combination(quantization="none", processes=2)


def of_the_matrix(stage: str, strategy: str) -> list[Combination]:
    """Return the cells of a stage and a strategy that work on two CPU ranks."""
    found = [cell for cell in cells(stage, "cpu") if cell.strategy == strategy]
    if stage != "sft":
        first = {cell.adapter: cell for cell in reversed(found)}
        found = [first[name] for name in ELSEWHERE]
    return [cell for cell in found if judge(cell).kind == "works"]


def around_it(strategy: str) -> list[Combination]:
    """Return LoRA's working cells with every optimizer, offload target and engine."""
    some = [replace(LORA, strategy=strategy, optimizer=name) for name in OPTIMIZERS]
    some += [replace(LORA, strategy=strategy, offload=name) for name in OFFLOADS]
    some += [replace(LORA, strategy=strategy, engine="trl", stage=name) for name in ("sft", "reward", "dpo")]
    some += [replace(LORA, strategy=strategy, adapter="full", optimizer="adafactor")]
    return [cell for cell in some if judge(cell).kind == "works"]


def failures(todo: list[Combination], world: World, out: Path) -> dict[str, str]:
    """Run cells, and return the output of those that failed."""
    answers = {name_of(cell): run_at_once(cell, world, out / name_of(cell)) for cell in todo}
    return {name: said for name, (status, said) in answers.items() if status}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "strategy"), list(product(stage_names(), STRATEGIES[1:])))
def test_cells_that_work_on_two_ranks_take_three_steps(
    stage: str, strategy: str, cell_world: World, tmp_path: Path
) -> None:
    todo = of_the_matrix(stage, strategy)
    assert todo or strategy in WEIGHTS_APART
    assert failures(todo, cell_world, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_optimizers_offloads_and_engines_that_work_take_three_steps(
    strategy: str, cell_world: World, tmp_path: Path
) -> None:
    assert failures(around_it(strategy), cell_world, tmp_path) == {}


def test_by_the_command_itself_and_what_comes_out(cell_world: World, tmp_path: Path) -> None:
    cell = replace(LORA, strategy="ddp")
    status, said = run(cell, cell_world, tmp_path / "run")
    assert status == 0, said
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished" and record["processes"] == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 3


def test_what_cannot_be_ends_with_status_2_before_anything_is_written(
    cell_world: World, tmp_path: Path
) -> None:
    refused = replace(LORA, strategy="zero2", adapter="adalora")
    status, said = run(refused, cell_world, tmp_path / "run")
    assert status == 2
    assert "train.strategy (run.yaml:" in said and "repair:   train.strategy=ddp" in said
    assert not (tmp_path / "run").exists()


def test_the_slow_tests_reach_every_strategy_and_stage() -> None:
    todo = [cell for pair in product(stage_names(), STRATEGIES[1:]) for cell in of_the_matrix(*pair)]
    assert {cell.strategy for cell in todo} == set(STRATEGIES[1:])
    assert {cell.stage for cell in todo} == set(stage_names())
    assert len({cell.adapter for cell in todo}) == 25 and len(todo) > 300
    assert all(cell in across(replace(cell, strategy="single")) for cell in todo)
