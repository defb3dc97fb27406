"""SIGINT and SIGTERM: the first signal stops after the step, the second at once."""

import os
import signal
import threading

import pytest
from fixture_types import MakeRecipe, Tune
from rich.console import Console

from finetune.training.recorder import Recorder
from finetune.training.stops import Interrupt, Interrupted, listening


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    with listening() as interrupt:
        assert interrupt.name == ""
        os.kill(os.getpid(), number)
        assert interrupt.name == number.name


def test_the_second_signal_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), listening() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="inside"), listening():
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise ValueError("inside")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_nothing_is_caught_and_nothing_breaks() -> None:
    seen: list[Interrupt] = []

    def work() -> None:
        with listening() as interrupt:
            seen.append(interrupt)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(seen) == 1 and seen[0].name == ""


def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_been(
    tune: Tune, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune("whole", train__max_steps=5, train__checkpoint_every=4)
    log = Recorder.on_log

    def ask_at_step_2(self: Recorder, args, state, control, logs=None, **kwargs) -> None:
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 2 and not self.interrupt.name:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "on_log", ask_at_step_2)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 3; checkpoint saved"):
        tune("run", train__max_steps=5, train__checkpoint_every=4)
    monkeypatch.undo()
    again = tune("run", train__max_steps=5, train__checkpoint_every=4)
    assert [line["step"] for line in again.metrics] == [1, 2, 3, 4, 5]
    assert again.record["files"] == whole.record["files"]
    assert again.samples == whole.samples


def test_the_recorder_is_silent_on_a_quiet_console(make_recipe: MakeRecipe, tmp_path) -> None:
    assert Recorder(None, Console(quiet=True), Interrupt(), logged=()).progress.disable
