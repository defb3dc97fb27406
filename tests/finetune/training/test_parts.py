"""Sharded models (ZeRO, FSDP2) on two processes: sharding check, saving, resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import warm
from fixture_types import MakeRecipe
from rich.console import Console
from safetensors.torch import load_file
from test_processes import close, share
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from finetune.recipe.errors import UserError
from finetune.training.launch import run_stage
from finetune.training.preflight.parts import Part, parts_tick

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess_handler, "Popen", warm.Popen)


def test_parts_are_told_apart_from_wholes() -> None:
    parted = [Part(50, 10, (0, 1)), Part(52, 11, (2, 3))]
    tick = parts_tick(parted, weights=102, trained=21, strategy="zero3")
    assert tick.problem is None and "at most 52 of 102 weights" in tick.detail
    whole = [Part(102, 10), Part(102, 11)]
    assert parts_tick(whole, weights=102, trained=21, strategy="zero2").problem is None
    told = parts_tick(whole, weights=102, trained=21, strategy="zero3").problem
    assert told is not None and "holds 102 of 102 weights" in told.found
    states = parts_tick([Part(51, 21), Part(51, 21)], weights=102, trained=21, strategy="zero1").problem
    assert states is not None and "21 of 21 optimizer state elements" in states.found


def test_the_same_rows_in_two_processes_are_refused() -> None:
    same = [Part(50, 10, (0, 1)), Part(50, 10, (1, 2))]
    told = parts_tick(same, weights=100, trained=20, strategy="zero2").problem
    assert told is not None and "same rows" in told.found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prefix", "prompt", "ptuning_v2", "full"])
def test_adapters_under_zero3_learn_what_one_process_does(make_recipe: MakeRecipe, method: str) -> None:
    given: dict[str, Any] = {"adapter__method": method}
    one, two = share(make_recipe, "one", 1, **given), share(make_recipe, "two", 2, "zero3", **given)
    expected = pytest.approx([line["loss"] for line in one.metrics], rel=1e-4)
    assert [line["loss"] for line in two.metrics] == expected
    assert "sharding" in {tick["name"] for tick in two.record["preflight"]}
    assert "saved" in {tick["name"] for tick in two.record["preflight"]}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_one_process_goes_on_from_parts(make_recipe: MakeRecipe, strategy: str, tmp_path: Path) -> None:
    whole = share(make_recipe, "whole", 1)
    share(make_recipe, "run", 2, strategy)
    _cut(tmp_path / "run", 2)
    again = run_stage(make_recipe("run", train__processes=1, train__strategy="auto"), QUIET, command="a test")
    assert [line["loss"] for line in again.metrics] == pytest.approx(
        [line["loss"] for line in whole.metrics], rel=1e-4
    )
    mine, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (again, whole))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 2e-3


@pytest.mark.slow
def test_zero_goes_on_from_its_own_parts_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = share(make_recipe, "whole", 1)
    share(make_recipe, "run", 2, "zero3")
    _cut(tmp_path / "run", 2)
    again = share(make_recipe, "run", 2, "zero3")
    close(whole, again)
    _cut(tmp_path / "run", 2)
    with pytest.raises(UserError, match="2 processes under zero3"):
        share(make_recipe, "run", 2, "zero2")


def _cut(run: Path, step: int) -> None:
    """Turn a finished run into one that was interrupted after a step."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(record | {"status": "interrupted"}), encoding="utf-8")
    for checkpoint in (run / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            (checkpoint / "checksums.json").unlink(missing_ok=True)
