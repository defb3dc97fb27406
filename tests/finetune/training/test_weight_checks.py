"""The checks of weights, and sharded models (ZeRO, FSDP2) on two processes: saving, resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from fixture_types import MakeRecipe
from rich.console import Console
from safetensors.torch import load_file
from test_multiprocess_runs import assert_close_runs, run_on_processes
from torch import nn
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from finetune.recipe.errors import UserError
from finetune.training.launch import launch_stage
from finetune.training.preflight.weight_checks import (
    RankShare,
    check_replicas_equal,
    check_sharding,
    trained_digest,
)

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess_handler, "Popen", warm.Popen)


def test_sharding_check_detects_replicated_weights() -> None:
    sharded = [RankShare(50, 10, (0, 1)), RankShare(52, 11, (2, 3))]
    result = check_sharding(sharded, weights=102, trained=21, strategy="zero3")
    assert result.problem is None and "at most 52 of 102 weights" in result.detail
    replicated = [RankShare(102, 10), RankShare(102, 11)]
    assert check_sharding(replicated, weights=102, trained=21, strategy="zero2").problem is None
    problem = check_sharding(replicated, weights=102, trained=21, strategy="zero3").problem
    assert problem is not None and "holds 102 of 102 weights" in problem.actual
    states = check_sharding(
        [RankShare(51, 21), RankShare(51, 21)], weights=102, trained=21, strategy="zero1"
    ).problem
    assert states is not None and "21 of 21 optimizer state elements" in states.actual


def test_sharding_check_detects_repeated_rows() -> None:
    shares = [RankShare(50, 10, (0, 1)), RankShare(50, 10, (1, 2))]
    problem = check_sharding(shares, weights=100, trained=20, strategy="zero2").problem
    assert problem is not None and "same rows" in problem.actual


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prefix", "prompt", "ptuning_v2", "full"])
def test_adapters_under_zero3_match_one_process(make_recipe: MakeRecipe, method: str) -> None:
    settings: dict[str, Any] = {"adapter__method": method}
    one, two = (
        run_on_processes(make_recipe, "one", 1, **settings),
        run_on_processes(make_recipe, "two", 2, "zero3", **settings),
    )
    expected = pytest.approx([entry["loss"] for entry in one.metrics], rel=1e-4)
    assert [entry["loss"] for entry in two.metrics] == expected
    assert "sharding" in {check["name"] for check in two.record["preflight"]}
    assert "saved" in {check["name"] for check in two.record["preflight"]}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_one_process_resumes_a_sharded_checkpoint(
    make_recipe: MakeRecipe, strategy: str, tmp_path: Path
) -> None:
    uninterrupted = run_on_processes(make_recipe, "whole", 1)
    run_on_processes(make_recipe, "run", 2, strategy)
    _interrupt_after(tmp_path / "run", 2)
    resumed = launch_stage(
        make_recipe("run", train__num_processes=1, train__strategy="auto"), QUIET, command="a test"
    )
    assert [entry["loss"] for entry in resumed.metrics] == pytest.approx(
        [entry["loss"] for entry in uninterrupted.metrics], rel=1e-4
    )
    resumed_weights, expected_weights = (
        load_file(run.adapter / "adapter_model.safetensors") for run in (resumed, uninterrupted)
    )
    assert (
        max(float((resumed_weights[name] - expected_weights[name]).abs().max()) for name in resumed_weights)
        < 2e-3
    )


@pytest.mark.slow
def test_zero_resumes_only_its_own_shards(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    uninterrupted = run_on_processes(make_recipe, "whole", 1)
    run_on_processes(make_recipe, "run", 2, "zero3")
    _interrupt_after(tmp_path / "run", 2)
    resumed = run_on_processes(make_recipe, "run", 2, "zero3")
    assert_close_runs(uninterrupted, resumed)
    _interrupt_after(tmp_path / "run", 2)
    with pytest.raises(UserError, match="2 processes under zero3"):
        run_on_processes(make_recipe, "run", 2, "zero2")


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "strategy"), [(2, "fsdp2"), (2, "zero3"), (1, "auto")])
def test_fsdp2_resumes_any_checkpoint(
    make_recipe: MakeRecipe, num_processes: int, strategy: str, tmp_path: Path
) -> None:
    uninterrupted = run_on_processes(make_recipe, "whole", 1)
    run_on_processes(make_recipe, "run", num_processes, strategy)
    _interrupt_after(tmp_path / "run", 2)
    resumed = run_on_processes(make_recipe, "run", 2, "fsdp2")
    assert resumed.record["status"] == "finished"
    assert_close_runs(uninterrupted, resumed)


def _interrupt_after(run: Path, step: int) -> None:
    """Turn a finished run into one that was interrupted after a step."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(record | {"status": "interrupted"}), encoding="utf-8")
    for checkpoint in (run / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            (checkpoint / "checksums.json").unlink(missing_ok=True)


def test_a_differing_rank_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = trained_digest(model)
    assert check_replicas_equal([before, before]).problem is None
    with torch.no_grad():
        model.weight[1, 2] += 1e-6
    problem = check_replicas_equal([before, before, trained_digest(model)]).problem
    assert problem is not None and problem.actual.startswith("the trained weights of rank 2 differ")


def test_frozen_weights_are_ignored() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    before = trained_digest(model)
    model.weight.data += 1
    assert trained_digest(model) == before
