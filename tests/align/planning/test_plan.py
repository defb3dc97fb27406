"""Plans of all shipped recipes: they exist, and their auto values fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.planning.plan import Plan, phases_of_rows, plan_of
from align.planning.timing import UNLIKE
from finetune.planning.devices import SURE, Device, device
from finetune.planning.memory import peak
from finetune.recipe.discovery import PROJECT, stage_names
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe, load

FILES = sorted(file for stage in stage_names() for file in (PROJECT / "recipes" / stage).glob("*.yaml"))
ROWS = [{"text": f"{i} and {i + 1}"} for i in range(8)]
CPU, A100 = device("cpu"), device("a100-80g")


def planned(stage: str, name: str, at: Device = A100, count: int = 1, **values: Any) -> Plan:
    given = {key.replace("__", "."): value for key, value in values.items()}
    return plan_of(load(stage, name, shortcuts=given), at, count)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_shipped_recipe_has_a_plan(file: Path) -> None:
    given = {"data__source": ROWS} if file.stem == "in-house" else {}
    # As published, on 8 GPUs: TRL samples all 512 completions of a step at once, 161 GiB on one GPU.
    many = 8 if file.parent.name == "grpo" else 1
    plan = planned(file.parent.name, file.stem, A100, many, **given)
    assert plan.fits and 0 < plan.trained <= plan.total
    assert (plan.trained < plan.total) == ("adapter" in plan.disk)
    assert plan.peak in plan.running and plan.peak.total == max(phase.total for phase in plan.running)
    assert plan.peak.total > plan.phases[0].total > 0
    assert plan.disk["checkpoints"] > 0
    known = plan.lengths.rows is not None or plan.recipe.settings.train.max_steps is not None
    assert (plan.work is not None) == known and (plan.seconds is not None) == known
    assert plan.lengths.how and all(value and why for value, why in plan.chosen.values())


def test_the_names_of_phases_are_those_of_the_stage() -> None:
    supervised = [phase.name for phase in planned("sft", "alpaca").phases]
    assert supervised == ["load", "forward and backward", "optimizer step", "merge", "save"]
    assert "rollout" in [phase.name for phase in planned("ppo", "hh").phases]


def test_rows_of_a_forward_pass_are_as_many_as_fit() -> None:
    small, large = planned("sft", "alpaca", device("rtx4090")), planned("sft", "alpaca", A100)
    assert small.fits and large.fits and small.rows < large.rows
    assert small.at(small.rows).accumulated == -(-128 // small.rows)
    assert peak(phases_of_rows(small.at(small.rows + 1))).total > SURE * small.device.room


def test_asked_rows_are_taken_as_they_are() -> None:
    plan = planned("sft", "alpaca", device("rtx4090"), train__micro_batch_size=16)
    assert plan.rows == 16 and not plan.fits


def test_processes_share_the_batch_and_what_the_strategy_partitions() -> None:
    alone = planned("sft", "alpaca", adapter__method="full")
    shared = planned("sft", "alpaca", A100, 8, adapter__method="full", train__strategy="zero3")
    assert (alone.step.processes, shared.step.processes, shared.step.strategy) == (1, 8, "zero3")
    assert not alone.fits and shared.fits
    assert shared.phases[0].parts["base"] * 7 < alone.phases[0].parts["base"]
    assert shared.work is not None and alone.work is not None and shared.work.steps == alone.work.steps


def test_an_old_card_computes_in_float32_and_says_why() -> None:
    value, why = planned("sft", "alpaca", device("t4")).chosen["model.precision"]
    assert value == "float32" and "no bfloat16" in why


def test_replies_take_room_beside_the_prompt() -> None:
    plan = planned("ppo", "quickstart", CPU, sampling__max_new_tokens=100, data__max_prompt_length=None)
    assert plan.chosen["data.max_prompt_length"] == (
        "412",
        "maximum length minus a completion of 100 tokens",
    )


def test_documents_become_blocks() -> None:
    plan = planned("pretrain", "quickstart", CPU, data__max_length=64)
    rows = plan.lengths.rows
    assert rows is not None and plan.lengths.longest == 64 and plan.lengths.together == 64
    assert 100 < rows < 3000


def test_a_merge_is_no_phase_of_the_run() -> None:
    plan = planned("sft", "alpaca", device("24GB"), adapter__method="qlora", model__base="llama-2-13b")
    merge = next(phase for phase in plan.phases if phase.name == "merge")
    assert plan.fits and merge.total > plan.device.room


def test_an_unknown_base_is_refused_in_one_message() -> None:
    with pytest.raises(UserError) as caught:
        planned("sft", "alpaca", model__base="owner/unheard-of")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(("method", "base"), [("llama_adapter", "gemma-2-2b"), ("bitfit", "llama-2-7b")])
def test_an_adapter_that_is_not_for_a_base_is_refused(method: str, base: str) -> None:
    with pytest.raises(UserError, match=r"adapter\.method.*a model of type"):
        planned("sft", "alpaca", adapter__method=method, model__base=base)


def run_of(recipe: Recipe, folder: Path, rate: float, seconds: float = 60.0) -> None:
    folder.mkdir(parents=True)
    record = {
        "status": "finished",
        "recipe": recipe.name,
        "digest": "0",
        "stage": recipe.stage,
        "hardware": {"device": "cpu", "name": "a CPU, 2 threads"},
        "load": {"model": {"base": "tiny"}, "precision": "float32", "quantization": "none"},
        "metrics": {"tokens_per_second": rate},
        "seconds": {"train": seconds},
    }
    (folder / "run.json").write_text(json.dumps(record))


def test_a_finished_run_tells_how_long_the_next_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load("sft", "quickstart")
    stated = plan_of(recipe, CPU, 1)
    assert stated.seconds is not None and stated.seconds.how.startswith("estimated")
    run_of(recipe, tmp_path / "runs" / "sft-quickstart-1", 1000.0)
    run_of(recipe, tmp_path / "runs" / "sft-quickstart-2", 2000.0)
    run_of(recipe, tmp_path / "runs" / "sft-quickstart-3", 9.0, seconds=5.0)
    measured = plan_of(recipe, CPU, 1)
    assert measured.seconds is not None and measured.work is not None
    assert "measured" in measured.seconds.how and "sft-quickstart-1" in measured.seconds.how
    assert measured.seconds.least == pytest.approx(measured.work.learnt / (2000 * (1 + UNLIKE)))
    assert measured.seconds.most == pytest.approx(measured.work.learnt / (1000 * (1 - UNLIKE)))
    elsewhere = plan_of(recipe, A100, 1)
    assert elsewhere.seconds is not None and elsewhere.seconds.how.startswith("estimated")


def test_a_notebook_plans_with_the_same_words() -> None:
    from align import load_recipe
    from align import plan as planned_by_name

    plan = planned_by_name(load_recipe("alpaca", base="llama-2-7b"), gpu="rtx4090")
    assert plan.peak.total == planned("sft", "alpaca", device("rtx4090")).peak.total
