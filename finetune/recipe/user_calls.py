"""Calls of user functions: durations, the report of a call that takes long, and the limit that ends it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

from finetune.recipe.terminal import echo

SLOW_SECONDS = 10.0
"""Duration of a call from which on it is reported, once per function."""
DEFAULT_LIMIT = 300.0
"""Default of ``train.function_timeout``, our choice: a first call may load a model of its own."""
GRACE_SECONDS = 10.0
"""Time after the limit from which on a call that still runs is reported."""
POLL_SECONDS = 1.0
LIMIT_SIGNALS = (signal.SIGALRM, signal.SIGURG)
"""The timer of the system sends the first one, also while a regular expression runs, which no thread could
interrupt. A function may use this timer itself, so a thread sends the second one too: hardly a program uses
it, and one that comes late is ignored by default."""


class FunctionTimeoutError(BaseException):
    """A call has reached its limit; no ``Exception``, since many functions catch all of these."""


@dataclass
class CallTimes:
    """Number and duration of the calls of one function."""

    calls: int = 0
    seconds: float = 0.0
    slowest: float = 0.0

    def add(self, seconds: float, calls: int = 1) -> None:
        self.calls, self.seconds = self.calls + calls, self.seconds + seconds
        self.slowest = max(self.slowest, seconds)


@dataclass
class RunningCall:
    """A call in progress.

    Attributes:
        function: ``file.py:function``.
        argument: shown in the report of a slow call.
        limit: seconds that it may take; None: no limit.
        start: time of its start, of the monotonic clock.
        can_stop: whether it is in the main thread, the only one that a signal interrupts.
        deadline: time from which on it is interrupted; None outside of the user's code.
        is_stuck: whether it was reported as running on after its limit.
    """

    function: str
    argument: str
    limit: float | None
    start: float = field(default_factory=time.monotonic)
    can_stop: bool = field(default_factory=lambda: threading.current_thread() is threading.main_thread())
    deadline: float | None = None
    is_stuck: bool = False

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Interrupt the user's code inside the block when the call has reached its limit.

        Raises:
            FunctionTimeoutError: it has; raised in the user's code.
        """
        if self.limit is None or not self.can_stop:
            yield
            return
        previous = {number: signal.signal(number, self._interrupt) for number in LIMIT_SIGNALS}
        timer = signal.setitimer(signal.ITIMER_REAL, self.limit, POLL_SECONDS)
        try:
            self.deadline = self.start + self.limit
            try:
                yield
            finally:
                self.deadline = None
        finally:
            self.deadline = None  # again: the signal may have come in the line above
            _restore(timer, time.monotonic() - self.start)
            for number, handler in previous.items():
                # None: a library's handler in C, which Python cannot set again.
                if handler is not None:
                    signal.signal(number, handler)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Raise FunctionTimeoutError in the main thread, unless the call has just returned."""
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            # Again later: a bare `except:` in a loop swallows it.
            self.deadline = now + POLL_SECONDS
            raise FunctionTimeoutError(f"it did not return within {self.limit:g} s")


@dataclass
class CallLog:
    """The calls of user functions in this process, by function.

    Attributes:
        limit: seconds that a call may take; None: no limit.
        times: calls by function.
        reported: functions that were reported as slow.
        running: the call in progress.
        was_stopped: whether a call was ended by its limit or by Ctrl-C: its threads may still run.
        watcher: the thread that reports.
        lock: guards ``watcher``.
    """

    limit: float | None = DEFAULT_LIMIT
    times: dict[str, CallTimes] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)
    running: RunningCall | None = None
    was_stopped: bool = False
    watcher: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        """Forget earlier calls, at the start of a run."""
        self.times, self.reported = {}, set()

    @contextmanager
    def timed(self, function: str, argument: str) -> Iterator[RunningCall]:
        """Measure a call.

        Args:
            function: ``file.py:function``.
            argument: shown in the report of a slow call.
        """
        outer, call = self.running, RunningCall(function, argument, self.limit)
        self.running = call
        self._watch()
        try:
            yield call
        except (FunctionTimeoutError, KeyboardInterrupt):
            self.was_stopped = True
            raise
        finally:
            self.running = outer
            self.times.setdefault(function, CallTimes()).add(time.monotonic() - call.start)

    def _watch(self) -> None:
        # A thread, since a function that never returns must be reported too.
        with self.lock:
            if self.watcher is None or not self.watcher.is_alive():
                self.watcher = threading.Thread(target=self._watch_calls, daemon=True)
                self.watcher.start()

    def _watch_calls(self) -> None:
        last_call = time.monotonic()
        while True:
            call, now = self.running, time.monotonic()
            if call is not None:
                last_call = now
                self._watch_call(call, now)
            time.sleep(POLL_SECONDS)
            with self.lock:
                if self.running is None and time.monotonic() - last_call >= SLOW_SECONDS:
                    self.watcher = None
                    return

    def _watch_call(self, call: RunningCall, now: float) -> None:
        seconds = now - call.start
        if seconds >= SLOW_SECONDS and call.function not in self.reported:
            self.reported.add(call.function)
            echo(slow_call_text(call, seconds), err=True)
        if call.limit is None or call.deadline is None:
            return
        main_thread = threading.main_thread().ident
        if now >= call.deadline and main_thread is not None:
            signal.pthread_kill(main_thread, LIMIT_SIGNALS[1])
        if seconds >= call.limit + GRACE_SECONDS and not call.is_stuck:
            call.is_stuck = True
            echo(stuck_call_text(call, seconds), err=True)


def _restore(timer: tuple[float, float], elapsed: float) -> None:
    """Set the process's timer to what is left of an earlier one."""
    delay, interval = timer
    signal.setitimer(signal.ITIMER_REAL, max(delay - elapsed, 0.001) if delay else 0.0, interval)


def slow_call_text(call: RunningCall, seconds: float) -> str:
    """Return the report of a slow call."""
    text = f"{call.function} has been running for {seconds:.0f} s on {call.argument}; the run waits for it"
    if call.limit is None:
        return f"{text} without a limit (train.function_timeout=null); {_stop_text()}"
    if call.can_stop:
        return f"{text} until {call.limit:g} s (train.function_timeout); {_stop_text()}"
    reason = "since the run was started outside of the main thread"
    return f"{text}, and train.function_timeout cannot end it {reason}; {_stop_text()}"


def stuck_call_text(call: RunningCall, seconds: float) -> str:
    """Return the report of a call that does not end at its limit."""
    return (
        f"{call.function} is still running after {seconds:.0f} s: it is in compiled code that Python cannot "
        f"interrupt, or catches every exception; `kill -9 {os.getpid()}` stops the run, and the same command "
        "resumes it from the last checkpoint"
    )


def _stop_text() -> str:
    return "Ctrl-C twice stops the run; the same command resumes from the last checkpoint"


def merge_call_times(of_ranks: list[dict[str, CallTimes]]) -> dict[str, dict[str, Any]]:
    """Return the calls of all ranks for run.json: their number, and the seconds of the slowest rank."""
    merged: dict[str, CallTimes] = {}
    for times in of_ranks:
        for function, rank_times in times.items():
            total = merged.setdefault(function, CallTimes())
            total.calls += rank_times.calls
            # Ranks call at the same time: the slowest one determines the duration.
            total.seconds = max(total.seconds, rank_times.seconds)
            total.slowest = max(total.slowest, rank_times.slowest)
    return {
        function: {key: round(value, 3) for key, value in asdict(times).items()}
        for function, times in merged.items()
    }


CALLS = CallLog()
"""The calls of this process."""
