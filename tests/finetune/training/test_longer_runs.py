"""Training longer in the same folder: bit for bit the longer run, or refused with reason and command."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from fixture_types import MakeRecipe, Tune

from finetune.recipe.errors import UserError
from finetune.training.result import Result
from finetune.training.run_directory import RunDirectory

CONSTANT = {"train__lr_schedule": "constant", "train__warmup": 2, "adapter__dropout": 0.1}
"""With dropout: the random state continues too."""


def outcome(result: Result) -> dict[str, Any]:
    """Return what a longer run must have in common with one that had its length from the start."""
    steps = [{key: value for key, value in entry.items() if key != "train_loss"} for entry in result.metrics]
    return {
        "files": result.record["files"],
        "steps": (result.record["steps"], steps),
        "samples": result.samples,
        "held_out": {key: value for key, value in result.record["metrics"].items() if "eval/" in key},
        "schedule": result.record["schedule"],
    }


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"train__max_steps": 3}, {"train__max_steps": 7}),
        pytest.param(
            {"train__max_steps": None, "train__epochs": 1.0},
            {"train__max_steps": None, "train__epochs": 1.5},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_longer_run_equals_one_of_that_length(
    tune: Tune, short: dict[str, Any], long: dict[str, Any]
) -> None:
    first = tune("run", **CONSTANT, **short)
    longer = tune("run", **CONSTANT, **long)
    assert longer.directory == first.directory
    assert longer.record["steps"] > first.record["steps"]
    assert outcome(longer) == outcome(tune("from-start", **CONSTANT, **long))
    entry = longer.record["trained_longer"]
    assert entry == [
        {
            "step": first.record["steps"],
            "planned_steps": first.record["steps"],
            "digest_before": first.record["digest"],
        }
    ]
    # The longer command is that of the run now, and the shorter one is told so.
    assert tune("run", **CONSTANT, **long).record["finished"] == longer.record["finished"]
    with pytest.raises(UserError, match="cannot be trained longer: it has|cannot be trained longer: a run"):
        tune("run", **CONSTANT, **short)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (
        {"train__lr_schedule": "cosine"},
        {"train__lr_schedule": "cosine", "train__max_steps": 9},
        "its cosine schedule was that of 3 steps, so its rates were others",
        "train.max_steps=6",
    ),
    (
        {"train__lr_schedule": "constant", "train__warmup": 0.4},
        {"train__lr_schedule": "constant", "train__warmup": 0.4, "train__max_steps": 9},
        "train.warmup was 2, and would be 4",
        "train.warmup=2 keeps it",
    ),
    (
        {"train__max_steps": None, "train__epochs": 1.0, "train__lr_schedule": "linear"},
        {"train__max_steps": None, "train__epochs": 3.0, "train__lr_schedule": "linear"},
        "its linear schedule was that of",
        "train.epochs=2",
    ),
]


@pytest.mark.parametrize(("short", "long", "reason", "repair"), REFUSED)
def test_other_steps_than_those_done_are_refused(
    tune: Tune, short: dict[str, Any], long: dict[str, Any], reason: str, repair: str
) -> None:
    run = tune("run", **short).directory
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    with pytest.raises(UserError, match=reason) as caught:
        tune("run", **long)
    assert repair in str(caught.value) and "the steps done so far" in str(caught.value)
    command = shlex.split(str(caught.value).split("`")[-2])
    assert command[:5] == ["llm-align", "sft", str(run), "--from", str(run)]
    assert {file: file.read_bytes() for file in run.iterdir() if file.is_file()} == before, "nothing written"


@pytest.mark.slow
def test_the_number_that_keeps_the_warm_up_is_taken(tune: Tune) -> None:
    constant = {"train__lr_schedule": "constant"}
    tune("run", **constant, train__warmup=0.4)
    longer = tune("run", **constant, train__warmup=2, train__max_steps=5)
    start = tune("from-start", **constant, train__warmup=2, train__max_steps=5)
    assert longer.record["files"] == start.record["files"]


def test_without_a_checkpoint_and_with_another_setting_it_is_another_run(
    tune: Tune, make_recipe: MakeRecipe
) -> None:
    run = tune("run", **CONSTANT).directory
    with pytest.raises(
        UserError, match=r"a run with other settings(?s:.*)train.learning_rate=0.01 \(here 0.02\)"
    ):
        tune("run", **CONSTANT, train__max_steps=9, train__learning_rate=0.02)
    longer = make_recipe("run", **CONSTANT, train__max_steps=9)
    assert not RunDirectory.of(longer, force=False).finished
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "checksums.json").unlink()
    with pytest.raises(UserError, match="it has no checkpoint to continue from"):
        RunDirectory.of(longer, force=False)


@pytest.mark.slow
def test_a_schedule_of_the_adapter_itself_is_refused(tune: Tune) -> None:
    tune("run", **CONSTANT, adapter__method="adalora")
    with pytest.raises(UserError, match="adapter 'adalora' has a schedule of its own over all steps"):
        tune("run", **CONSTANT, adapter__method="adalora", train__max_steps=9)


@pytest.mark.slow
def test_the_record_names_what_was_trained(tune: Tune) -> None:
    record = json.loads((Path(tune("run", **CONSTANT).directory) / "run.json").read_text())
    assert record["schedule"] == {"decay": "constant", "warmup": 2, "steps": 3, "batch_size": 8}
