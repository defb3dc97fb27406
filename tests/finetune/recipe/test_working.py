"""A command that prints nothing for a while says what it is doing."""

import io
import re
import time

import pytest

from finetune.recipe import console as console_module
from finetune.recipe.console import Terminal, working


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("SILENCE", 0.05), ("LONGEST_SILENCE", 0.1), ("POLL", 0.01)):
        monkeypatch.setattr(console_module, name, seconds)


def wait_for(stream: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.01)


def test_a_silent_block_prints_what_it_does() -> None:
    stream = io.StringIO()
    console = Terminal(file=stream)
    with working(console, "loading the model"):
        wait_for(stream, "loading")
    assert re.fullmatch(r"(  loading the model: \d+ s\n)+", stream.getvalue())
    assert console.activities == []
    # Nothing is printed after the block.
    length = len(stream.getvalue())
    time.sleep(0.1)
    assert len(stream.getvalue()) == length


def test_the_innermost_block_prints_and_an_empty_one_is_silent() -> None:
    stream = io.StringIO()
    console = Terminal(file=stream)
    with working(console, "preparing"):
        with working(console, "evaluating"):
            wait_for(stream, "evaluating")
            stream.truncate(0)
            wait_for(stream, "evaluating")
            assert "preparing" not in stream.getvalue()
        with working(console, ""):
            time.sleep(0.15)
            stream.truncate(0)
            time.sleep(0.15)
            assert stream.getvalue() == ""
        wait_for(stream, "preparing")


def test_lines_of_the_block_itself_put_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "SILENCE", 60.0)
    stream = io.StringIO()
    with working(console := Terminal(file=stream), "checking"):
        console.print("ok")
        time.sleep(0.05)
    assert stream.getvalue() == "ok\n"


def test_quiet_consoles_and_failures_leave_no_thread() -> None:
    quiet = Terminal(quiet=True)
    with working(quiet, "loading"):
        assert quiet.activities == []
    console = Terminal(file=io.StringIO())
    with pytest.raises(ValueError, match="no model"), working(console, "loading"):
        raise ValueError("no model")
    assert console.activities == []


def test_a_lost_output_ends_the_thread_alone() -> None:
    class Lost(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    console = Terminal(file=Lost())
    lost: list[bool] = []
    console.on_lost = lambda: lost.append(True)
    with working(console, "loading"):
        time.sleep(0.2)
    assert lost[:1] == [True]
