"""The limit that ends a call of a user function (``train.function_timeout``)."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.recipe import user_calls
from finetune.recipe.errors import UserFunctionError
from finetune.recipe.user_arguments import CompletionRow, RowFunction
from finetune.recipe.user_calls import CALLS
from finetune.recipe.user_function import (
    UserFunction,
    call_for_number,
    call_for_numbers,
    load_user_function,
)

LIMIT = 0.1
HANGS = {
    "a loop": "while True:\n        pass",
    "a sleep": "time.sleep(100)",
    "a lock": "(lock := threading.Lock()).acquire() and lock.acquire()",
    "a queue": "queue.Queue().get()",
    "a regular expression": "re.match('(a+)+b', 'a' * 60)",
    "a large power": "str(3 ** 10**8)",
    "a process": "subprocess.run(['sleep', '100'])",
    "a socket": "socket.create_server(('127.0.0.1', 0)).accept()",
    "an event loop": "asyncio.run(asyncio.sleep(100))",
    "a thread": "(t := threading.Thread(target=time.sleep, args=(3,), daemon=True)).start() or t.join()",
    "every exception is caught": "while True:\n        try:\n            time.sleep(100)\n"
    "        except Exception:\n            pass",
    "tried again without end": "while True:\n        try:\n            time.sleep(100)\n"
    "        except:\n            time.sleep(100)",
    "an alarm of its own, turned off": "signal.signal(signal.SIGALRM, print)\n    signal.alarm(50)\n"
    "    signal.alarm(0)\n    time.sleep(100)",
}
HEAD = "import asyncio, queue, re, signal, socket, subprocess, threading, time\n\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., UserFunction]]:
    """Return a loader of functions with a body, which may take 0.1 s."""
    monkeypatch.setattr(user_calls, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(CALLS, "limit", LIMIT)
    monkeypatch.setattr(CALLS, "watcher", None)  # one that polls each second
    handlers = [signal.getsignal(number) for number in user_calls.LIMIT_SIGNALS]

    def loader(body: str, parameters: str = "prompt, completion") -> UserFunction:
        (tmp_path / "rules.py").write_text(f"{HEAD}def rule({parameters}):\n    {body}\n")
        return load_user_function(f"{tmp_path}/rules.py:rule", where="here")

    yield loader
    assert [signal.getsignal(number) for number in user_calls.LIMIT_SIGNALS] == handlers
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and CALLS.running is None


@pytest.mark.parametrize("body", HANGS.values(), ids=list(HANGS))
def test_a_call_that_hangs_is_ended_with_its_line(load: Callable[..., UserFunction], body: str) -> None:
    function = load(body)
    with pytest.raises(UserFunctionError) as message:
        call_for_number(function, "the prompt", "the reply", where="reward 'rule'")
    [problem] = message.value.problems
    assert re.search(r"it did not return within 0\.1 s \(.*rules\.py:\d+\)", problem.actual)
    assert "prompt 'the prompt', completion 'the reply'" in problem.actual
    assert problem.repair == "correct the function, or raise train.function_timeout"
    # The next call has a limit of its own.
    assert load("return 1.0")("p", "c") == 1.0


def test_a_batch_that_hangs_is_ended(load: Callable[..., UserFunction]) -> None:
    function = RowFunction(load("time.sleep(100)", parameters="completions"))
    rows = [CompletionRow("p", "c")] * 2
    with pytest.raises(
        UserFunctionError, match=r"did not return within 0\.1 s(.|\n)*train\.function_timeout"
    ):
        call_for_numbers(lambda: function.call_batch(rows), 2, where="here")


def test_a_function_s_own_alarm_works_and_an_earlier_timer_continues(
    load: Callable[..., UserFunction], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CALLS, "limit", 100.0)
    fired: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda number, frame: fired.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    body = (
        "signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    try:\n        time.sleep(100)\n"
        "    except TimeoutError:\n        return 2.0"
    )
    try:
        assert load(body)("p", "c") == 2.0
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3 and not fired
        while not fired:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_outside_the_main_thread_the_report_says_that_nothing_ends_the_call(
    load: Callable[..., UserFunction], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(user_calls, "SLOW_SECONDS", 0.02)
    CALLS.clear()
    function, values = load("time.sleep(0.5)\n    return 3.0"), []
    thread = threading.Thread(target=lambda: values.append(function("p", "c")))
    thread.start()
    thread.join()
    assert values == [3.0]
    assert "train.function_timeout cannot end it since the run was started" in capsys.readouterr().err


def test_a_call_that_catches_everything_is_reported_with_what_ends_it(
    load: Callable[..., UserFunction], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(user_calls, "GRACE_SECONDS", 0.1)
    # It ends after its limit, as compiled code does: the signal waits for it.
    body = "end = time.monotonic() + 0.6\n    while time.monotonic() < end:\n        try:\n"
    body += "            time.sleep(0.6)\n        except:\n            pass\n    return 4.0"
    assert load(body)("p", "c") == 4.0
    error = capsys.readouterr().err
    assert error.count("is still running after") == 1 and "kill -9" in error


def test_without_a_limit_no_signal_is_used(
    load: Callable[..., UserFunction], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CALLS, "limit", None)
    handler = "return float(signal.getsignal(signal.SIGALRM) == signal.SIG_DFL)"
    assert load(handler)("p", "c") == 1.0


POOL = """
import sys
from align.cli.exit_status import fail
from finetune.recipe.errors import UserError
from finetune.recipe.user_calls import CALLS
from finetune.recipe.user_function import call_for_number, load_user_function
CALLS.limit = 0.2
try:
    call_for_number(load_user_function("{file}:rule", where="here"), "p", "c", where="reward")
except UserError as error:
    fail(str(error), 2)
"""


def test_the_program_does_not_wait_for_threads_of_the_function(tmp_path: Path) -> None:
    file = tmp_path / "rules.py"
    file.write_text(
        "import time\nfrom concurrent.futures import ThreadPoolExecutor\n\n"
        "def rule(prompt, completion):\n    pool = ThreadPoolExecutor(1)\n"
        "    return pool.submit(time.sleep, 60).result()\n"
    )
    command = [sys.executable, "-c", POOL.format(file=file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert result.returncode == 2 and "did not return within 0.2 s" in result.stderr
