"""Runs initialized from a run: they start where it ended, are self-contained, and resume bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from fixture_types import MakeRecipe, Tune
from rich.console import Console
from safetensors.torch import load_file
from test_adapter_runs import interrupted_at, settings_of

from finetune.distributed.hardware import detect_hardware
from finetune.distributed.interrupts import Interrupted
from finetune.recipe.errors import UserError
from finetune.training.context import RunContext
from finetune.training.fingerprint import run_fingerprint
from finetune.training.loaded_model import load_finished_run
from finetune.training.loading import load_policy
from finetune.training.result import Result
from finetune.training.run_directory import RunDirectory
from finetune.training.stage import run_stage


def parent_of(result: Result) -> dict[str, str]:
    return {"model__init_from": str(result.directory)}


def test_it_starts_where_the_parent_ended_and_is_self_contained(tune: Tune) -> None:
    first = tune("first")
    second = tune("second", **parent_of(first))
    record = second.record
    assert record["metrics"]["eval/loss_before"] == first.record["metrics"]["eval/loss_after"]
    assert [sample["before"] for sample in second.samples] == [sample["after"] for sample in first.samples]
    assert record["files"] != first.record["files"]
    assert record["init_from"] == {
        "name": "first",
        "folder": str(first.directory),
        "stage": "sft",
        "recipe": "sums",
        "digest": first.record["digest"],
        "files": first.record["files"],
    }
    assert "init_from" not in record["reload"]["model"]
    shutil.rmtree(first.directory)
    loaded_model = load_finished_run(second.directory)
    saved = load_file(second.adapter / "adapter_model.safetensors")
    live = {name.replace(".default", ""): weight for name, weight in loaded_model.model.named_parameters()}
    assert saved and all(torch.equal(live[name], value) for name, value in saved.items())


def test_the_policy_is_the_run_s_adapter_trainable_and_nothing_else(
    tune: Tune, make_recipe: MakeRecipe
) -> None:
    first = tune("first")
    recipe = make_recipe("second", **parent_of(first))
    run = RunDirectory.of(recipe, force=False)
    model = load_policy(RunContext(recipe, run, Console(quiet=True), "a test")).model
    saved = load_file(first.adapter / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): w for name, w in model.named_parameters() if w.requires_grad}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(weight.detach(), saved[name]) for name, weight in trained.items())


def test_another_parent_is_another_run(tune: Tune, make_recipe: MakeRecipe) -> None:
    first, other = tune("first"), tune("other", train__seed=1)
    settings = [make_recipe("x", **parent_of(run)).settings for run in (first, other)]
    plain = make_recipe("x").settings
    assert len({run_fingerprint(run_settings) for run_settings in (*settings, plain)}) == 3
    copy = shutil.copytree(first.directory, first.directory.parent / "copy")
    assert run_fingerprint(make_recipe("x", model__init_from=str(copy)).settings) == run_fingerprint(
        settings[0]
    )
    tune("second", **parent_of(first))
    with pytest.raises(UserError, match="a run with other settings or data"):
        tune("second", **parent_of(other))


@pytest.mark.parametrize("method", ["loftq", "adalora", "adamix", "adaptive_prefix"])
def test_resumed_continuation_is_bit_identical(
    method: str, tune: Tune, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With seed 0 all ReLUs of a layer of AdaMix are dead from the start: a warning.
    rate = {"train__learning_rate": 1e-3, "train__seed": 0}
    first = tune("first", **settings_of(method), **rate)
    settings = parent_of(first) | rate | {"train__max_steps": 6, "evaluate__samples": 1}
    uninterrupted = tune("whole", **settings)
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(Interrupted):
            tune("cut", **settings)
    resumed = run_stage(make_recipe("cut", **settings), Console(quiet=True), command="a test")
    assert resumed.record["files"] == uninterrupted.record["files"] != first.record["files"]
    assert load_finished_run(resumed.directory).model.training is False


def test_trl_trains_a_parent_s_adapter_further(tune: Tune) -> None:
    first = tune("first")
    second = tune("second", train__engine="trl", **parent_of(first))
    metrics = [run.record["metrics"] for run in (first, second)]
    assert metrics[1]["eval/loss_before"] == metrics[0]["eval/loss_after"]
    assert metrics[1]["eval/loss_after"] != metrics[1]["eval/loss_before"]


@pytest.mark.skipif(detect_hardware().device != "cpu", reason="equal bits: the CPU's")
def test_a_run_of_full_tuning_becomes_the_base_of_a_new_adapter(tune: Tune, base_folder: Path) -> None:
    first = tune("first", adapter__method="full", train__learning_rate=1e-3)
    second = tune("second", **parent_of(first))
    assert second.record["reload"]["model"]["base"] == str(first.directory)
    assert second.record["reload"]["model"]["base"] != str(base_folder)
    assert second.adapter.name == "adapter" and second.record["init_from"]["name"] == "first"
    before, after = (run.record["metrics"] for run in (second, first))
    assert before["eval/loss_before"] == pytest.approx(after["eval/loss_after"], rel=1e-6)
    assert load_finished_run(second.directory).model.training is False


def test_a_missing_parent_is_refused(tune: Tune, make_recipe: MakeRecipe) -> None:
    first = tune("first")
    recipe = make_recipe("second", **parent_of(first))
    shutil.rmtree(first.directory)
    with pytest.raises(UserError, match="first: not a run"):
        run_stage(recipe, Console(quiet=True), command="a test")
    assert not (first.directory.parent / "second").exists()
