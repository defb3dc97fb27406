"""The compatibility matrix is correct: cells marked as working train three steps on two CPU ranks."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from matrix_runs import CellFiles, cell_name, run_at_once, run_cell

from align.planner.compatibility import across_strategies, matrix_cells
from finetune.distributed.solver import OFFLOADS, OPTIMIZER_NAMES, Combination, check
from finetune.distributed.strategies import SHARDED_WEIGHTS, STRATEGIES
from finetune.recipe.discovery import stage_names

COMMON_ADAPTERS = ("adalora", "bitfit", "full", "lora", "loftq", "pissa", "prefix", "prompt", "ptuning")
"""Adapters that every stage runs, one of each kind; stage sft runs all, with every quantization."""
LORA = Combination(quantization="none", processes=2)


def working_cells(stage: str, strategy: str) -> list[Combination]:
    """Return the cells of a stage and a strategy that work on two CPU ranks."""
    matrix = [cell for cell in matrix_cells(stage, "cpu") if cell.strategy == strategy]
    if stage != "sft":
        first_cells = {cell.adapter: cell for cell in reversed(matrix)}
        matrix = [first_cells[name] for name in COMMON_ADAPTERS]
    return [cell for cell in matrix if check(cell).kind == "works"]


def lora_cells(strategy: str) -> list[Combination]:
    """Return LoRA's working cells with every optimizer, offload target and engine."""
    combinations = [replace(LORA, strategy=strategy, optimizer=name) for name in OPTIMIZER_NAMES]
    combinations += [replace(LORA, strategy=strategy, offload=name) for name in OFFLOADS]
    combinations += [
        replace(LORA, strategy=strategy, engine="trl", stage=name) for name in ("sft", "reward", "dpo")
    ]
    combinations += [replace(LORA, strategy=strategy, adapter="full", optimizer="adafactor")]
    return [cell for cell in combinations if check(cell).kind == "works"]


def failures(selected: list[Combination], files: CellFiles, out: Path) -> dict[str, str]:
    """Run cells, and return the output of those that failed."""
    answers = {cell_name(cell): run_at_once(cell, files, out / cell_name(cell)) for cell in selected}
    return {name: said for name, (status, said) in answers.items() if status}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "strategy"), list(product(stage_names(), STRATEGIES[1:])))
def test_working_cells_train_three_steps_on_two_ranks(
    stage: str, strategy: str, cell_files: CellFiles, tmp_path: Path
) -> None:
    selected = working_cells(stage, strategy)
    assert selected or strategy in SHARDED_WEIGHTS
    assert failures(selected, cell_files, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_working_optimizers_offloads_and_engines_train_three_steps(
    strategy: str, cell_files: CellFiles, tmp_path: Path
) -> None:
    assert failures(lora_cells(strategy), cell_files, tmp_path) == {}


def test_cell_by_command_line(cell_files: CellFiles, tmp_path: Path) -> None:
    cell = replace(LORA, strategy="ddp")
    status, output = run_cell(cell, cell_files, tmp_path / "run")
    assert status == 0, output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished" and record["processes"] == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 3


def test_incompatible_cells_exit_with_status_2(cell_files: CellFiles, tmp_path: Path) -> None:
    refused = replace(LORA, strategy="zero2", adapter="adalora")
    status, output = run_cell(refused, cell_files, tmp_path / "run")
    assert status == 2
    assert "train.strategy (run.yaml:" in output and "repair:   train.strategy=ddp" in output
    assert not (tmp_path / "run").exists()


def test_slow_tests_cover_every_strategy_and_stage() -> None:
    selected = [cell for pair in product(stage_names(), STRATEGIES[1:]) for cell in working_cells(*pair)]
    assert {cell.strategy for cell in selected} == set(STRATEGIES[1:])
    assert {cell.stage for cell in selected} == set(stage_names())
    assert len({cell.adapter for cell in selected}) == 25 and len(selected) > 300
    assert all(cell in across_strategies(replace(cell, strategy="single")) for cell in selected)
