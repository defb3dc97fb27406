"""DPO on the TRL engine: the same run from the same recipe, and what TRL does not support."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.dpo.settings import TRL_LOSS_TYPES
from finetune.distributed.interrupts import Interrupted, NotFiniteError
from finetune.recipe.errors import UserError
from finetune.training.loaded_model import load_finished_run
from finetune.training.recorder import Recorder
from finetune.training.result import Result

Runs = Callable[..., Result]
TRL: dict[str, Any] = {"train__engine": "trl"}
QUIET = {"evaluate__samples": 0}


def test_both_engines_have_equal_metrics_and_learn(prefer: Runs) -> None:
    ours, theirs = prefer("ours"), prefer("theirs", train__max_steps=12, train__evaluate_every=6, **TRL)
    before, after = ours.record["metrics"], theirs.record["metrics"]
    for name in (
        "loss",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "logratios/chosen",
    ):
        key = f"eval/{name}_before"
        assert after[key] == pytest.approx(before[key], abs=1e-4), name
    assert after["eval/rewards/accuracies_after"] == 1.0 and after["eval/rewards/margins_after"] > 0.5
    steps = [line for line in theirs.metrics if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(steps) == 12 and {"rewards/margins", "rewards/accuracies"} <= steps[0].keys()
    assert [line["step"] for line in theirs.metrics if "eval/loss" in line] == [6, 12]
    assert theirs.record["diagnostics"], "the run explains itself"
    assert not (theirs.adapter / "ref").exists()
    assert load_finished_run(theirs.directory).model.training is False


@pytest.mark.parametrize("name", TRL_LOSS_TYPES)
def test_policy_equals_reference_for_every_trl_loss(prefer: Runs, name: str) -> None:
    loss = {"name": name, "length_normalized": True} if name == "ipo" else {"name": name}
    result = prefer(dpo__loss=loss, data__held_out=0, **TRL, **QUIET)
    passed = {check["name"]: check["passed"] for check in result.record["preflight"]}
    assert passed["start"] is True and len(result.metrics) == 3


@pytest.mark.parametrize("method", ["prefix", "prompt", "ia3", "full", "vera", "oft", "dora", "qlora"])
def test_policy_equals_reference_for_adapters(prefer: Runs, method: str) -> None:
    result = prefer(adapter__method=method, data__held_out=0, train__max_steps=2, **TRL, **QUIET)
    passed = {check["name"]: check["passed"] for check in result.record["preflight"]}
    assert passed == dict.fromkeys(passed, True) and {"start", "base"} <= passed.keys()


def test_interrupted_run_resumes_bit_for_bit(prefer: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    uninterrupted = prefer("whole", train__max_steps=5, adapter__dropout=0.1, **TRL)
    log = Recorder.on_log

    def interrupt_at_step_2(self: Recorder, args, state, control, logs=None, **kwargs) -> None:
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 2 and not self.signal_flag.signal_name:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "on_log", interrupt_at_step_2)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 3; checkpoint saved"):
        prefer(train__max_steps=5, adapter__dropout=0.1, **TRL)
    monkeypatch.undo()
    resumed = prefer(train__max_steps=5, adapter__dropout=0.1, **TRL)
    assert [line["step"] for line in resumed.metrics] == [1, 2, 3, 4, 5]
    assert resumed.record["files"] == uninterrupted.record["files"]


def test_non_finite_loss_names_step_and_rows(prefer: Runs) -> None:
    with pytest.raises(NotFiniteError, match=r"^loss is (nan|inf) at step \d, on \S*pairs\.jsonl:\d+(, |$)"):
        prefer(train__learning_rate=1e30, train__warmup=0, data__held_out=0, **TRL, **QUIET)


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"dpo__loss": "cdpo"}, ["dpo.loss", "'cdpo'", "train.engine=native"]),
        ({"dpo__loss": "ipo"}, ["dpo.loss", "summed over tokens", "length_normalized: true"]),
        ({"dpo__reference": "live"}, ["dpo.reference", "dpo.reference=precomputed"]),
        ({"adapter__method": "pissa"}, ["adapter.method", "adapter.method=lora"]),
        ({"train__engine_args": {"beta": 1}}, ["train.engine_args.beta", "set by the recipe"]),
    ],
)
def test_unsupported_recipes_are_refused_before_writing(
    prefer: Runs, tmp_path: Path, settings: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        prefer(**settings, **TRL)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_ranked_lists_are_refused(prefer: Runs, lists_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lists\.jsonl:\d+, [34] completions"):
        prefer(data__source=str(lists_file), data__held_out=0, **TRL)
    assert not (tmp_path / "run").exists()
