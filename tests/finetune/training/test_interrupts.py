"""SIGINT and SIGTERM: the first signal stops after the step, the second at once."""

import io
import os
import signal
import threading

import pytest
from fixture_types import MakeRecipe, Tune
from rich.console import Console

from finetune.distributed.interrupts import Interrupted, SignalFlag, catch_signals
from finetune.training.recorder import Recorder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_recorded(number: signal.Signals) -> None:
    with catch_signals() as flag:
        assert flag.signal_name == ""
        os.kill(os.getpid(), number)
        assert flag.signal_name == number.name


def test_the_second_signal_raises() -> None:
    with pytest.raises(KeyboardInterrupt), catch_signals() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.signal_name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)


def test_previous_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="inside"), catch_signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise ValueError("inside")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_no_signals_are_caught_outside_the_main_thread() -> None:
    seen: list[SignalFlag] = []

    def work() -> None:
        with catch_signals() as flag:
            seen.append(flag)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(seen) == 1 and seen[0].signal_name == ""


def test_an_interrupted_run_resumes_bit_identically(
    tune: Tune, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = tune("whole", train__max_steps=5, train__checkpoint_every=4)
    log = Recorder.on_log

    def ask_at_step_2(self: Recorder, args, state, control, logs=None, **kwargs) -> None:
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 2 and not self.signal_flag.signal_name:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "on_log", ask_at_step_2)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 3; checkpoint saved"):
        tune("run", train__max_steps=5, train__checkpoint_every=4)
    monkeypatch.undo()
    resumed = tune("run", train__max_steps=5, train__checkpoint_every=4)
    assert [entry["step"] for entry in resumed.metrics] == [1, 2, 3, 4, 5]
    assert resumed.record["files"] == uninterrupted.record["files"]
    assert resumed.samples == uninterrupted.samples


def test_progress_is_shown_on_terminals_and_not_on_quiet_ones() -> None:
    shown = {}
    for name, words in {"terminal": {}, "quiet": {"quiet": True}, "file": {"force_terminal": False}}.items():
        console = Console(**{"file": io.StringIO(), "force_terminal": True} | words)
        recorder = Recorder(None, console, SignalFlag(), logged_keys=())
        with recorder.progress:
            recorder.progress.add_task("", total=3, loss="", rate="")
        shown[name] = "0/3" in console.file.getvalue()
    assert shown == {"terminal": True, "quiet": False, "file": False}
