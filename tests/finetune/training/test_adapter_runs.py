"""Complete runs with every adapter: saved, reloaded, and bit-identical after an interruption."""

import os
import signal
from typing import Any

import pytest
from fixture_types import MakeRecipe, Tune
from rich.console import Console

from finetune.distributed.interrupts import Interrupted
from finetune.recipe.discovery import ADAPTERS, load_plugin, plugin_names
from finetune.recipe.errors import UserError
from finetune.training.loaded_model import load_finished_run
from finetune.training.recorder import Recorder
from finetune.training.stage import run_stage

NO_BIASES = "bitfit"
METHODS = [
    name
    for name in plugin_names(ADAPTERS)
    if name not in ("full", "lora", NO_BIASES)  # lora: the other tests of this folder
]
SMALL = {"virtual_tokens": 5, "rank": 4, "dropout": 0.1, "encoder_hidden_size": 16, "bottleneck_size": 8}


def settings_of(method: str) -> dict[str, Any]:
    known = load_plugin(ADAPTERS, method, where="test").Settings.model_fields
    settings = {f"adapter__{key}": value for key, value in SMALL.items() if key in known}
    if method == "trainable_tokens":
        settings["adapter__tokens"] = list(range(20, 60))
    return {"adapter__method": method, **settings}


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Recorder.on_log

    def ask(self: Recorder, args, state, control, logs=None, **kwargs) -> None:
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == step and not self.signal_flag.signal_name:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "on_log", ask)


@pytest.mark.parametrize("method", [*METHODS, "projected prefix"])
def test_resumed_adapter_is_bit_identical(
    method: str, tune: Tune, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(method.removeprefix("projected "))
    if method == "projected prefix":
        settings["adapter__projection"] = True
    settings |= {"train__max_steps": 6, "evaluate__samples": 1}
    uninterrupted = tune("whole", **settings)
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(Interrupted):
            tune("cut", **settings)
    resumed = run_stage(make_recipe("cut", **settings), Console(quiet=True), command="a test")
    records = [uninterrupted.record, resumed.record]
    assert records[0]["files"] == records[1]["files"]
    assert records[0]["metrics"]["eval/loss_after"] == records[1]["metrics"]["eval/loss_after"]
    assert records[0]["metrics"]["eval/loss_after"] != records[0]["metrics"]["eval/loss_before"]
    assert load_finished_run(resumed.directory).model.training is False


def test_bitfit_refuses_a_base_without_biases(tune: Tune) -> None:
    with pytest.raises(UserError, match="has no bias terms") as error:
        tune(adapter__method=NO_BIASES)
    assert "adapter.method=ia3" in str(error.value)
