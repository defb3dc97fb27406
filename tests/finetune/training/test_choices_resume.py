"""NEFTune, label smoothing and RoPE scaling: an interrupted run ends like the uninterrupted one."""

import os
import signal
from typing import Any

import pytest
from fixture_types import MakeRecipe, Tune
from rich.console import Console

from finetune.distributed.interrupts import Interrupted
from finetune.training.recorder import Recorder
from finetune.training.stage import run_stage

LONG = [{"instruction": "word " * (20 + 61 * index % 400), "output": "b"} for index in range(40)]
ROPE_SCALED = {"data__source": LONG, "data__held_out": 4, "data__max_length": 512}
CHOICES: dict[str, dict[str, Any]] = {
    "noise": {"train__neftune_alpha": 5.0},
    "noise on packed rows": {"train__neftune_alpha": 5.0, "data__packing": True},
    "smoothed": {"train__label_smoothing": 0.1},
    "dynamic": {"model__rope": {"method": "dynamic", "factor": 2}, **ROPE_SCALED},
    "yarn": {"model__rope": {"method": "yarn", "factor": 2}, **ROPE_SCALED},
}


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Recorder.on_log

    def ask(self: Recorder, args, state, control, logs=None, **kwargs) -> None:
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == step and not self.signal_flag.signal_name:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "on_log", ask)


@pytest.mark.parametrize("name", CHOICES)
def test_pain_05_interrupted_or_not_the_adapter_is_the_same(
    name: str, tune: Tune, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"adapter__dropout": 0.1, "train__max_steps": 6, "evaluate__samples": 1, **CHOICES[name]}
    uninterrupted = tune("whole", **settings)
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(Interrupted):
            tune("cut", **settings)
    resumed = run_stage(make_recipe("cut", **settings), Console(quiet=True), command="a test")
    assert resumed.record["files"] == uninterrupted.record["files"]
