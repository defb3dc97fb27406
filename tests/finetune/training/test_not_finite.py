"""NaN and infinite losses end a run as failed, at any step and with both engines."""

import json
from pathlib import Path

import pytest
from fixture_types import Tune

from finetune.distributed.interrupts import NotFiniteError


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_pain_25_a_loss_that_is_no_number_names_step_and_rows(tune: Tune, tmp_path: Path) -> None:
    error = r"^loss is (nan|inf) at step 2, on \S*sums\.jsonl:\d+(, \S*sums\.jsonl:\d+){3}$"
    with pytest.raises(NotFiniteError, match=error):
        tune("run", train__learning_rate=1e30, train__warmup=0, evaluate__samples=0)
    run_json = record(tmp_path / "run")
    assert run_json["status"] == "failed" and "at step 2" in run_json["error"]
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("log_every", [1, 10])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_pain_25_trl_is_watched_too(tune: Tune, tmp_path: Path, method: str, log_every: int) -> None:
    with pytest.raises(NotFiniteError, match=r"^loss is (nan|inf) at step \d, on \S*sums\.jsonl:\d+(, |$)"):
        tune(
            "run",
            train__engine="trl",
            adapter__method=method,
            train__log_every=log_every,
            train__learning_rate=1e30,
            evaluate__samples=0,
            data__held_out=0,
        )
    assert record(tmp_path / "run")["status"] == "failed"


def test_pain_25_a_nan_after_the_last_step_fails_the_run(tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="held-out loss is (nan|inf) after"):
        tune("run", train__learning_rate=1e30, train__warmup=0, train__max_steps=1, evaluate__samples=0)
    assert record(tmp_path / "run")["status"] == "failed"


def test_a_failed_run_restarts_with_force(tune: Tune) -> None:
    with pytest.raises(NotFiniteError):
        tune("run", train__learning_rate=1e30, evaluate__samples=0)
    restarted = tune("run", evaluate__samples=0, force=True)
    assert restarted.record["status"] == "finished" and "error" not in restarted.record
    assert [entry["step"] for entry in restarted.metrics] == [1, 2, 3]


def test_a_run_without_evaluation_finishes(tune: Tune) -> None:
    result = tune("run", train__log_every=10, evaluate__samples=0, data__held_out=0)
    assert result.record["status"] == "finished" and result.metrics == []
