"""Durations of the calls of user functions; a call that takes long is reported while it runs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.recipe.terminal import echo

SLOW_SECONDS = 10.0
"""Duration of a call from which on it is reported, once per function."""
POLL_SECONDS = 1.0


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
class CallLog:
    """The calls of user functions in this process, by function; ``running`` is the call in progress."""

    times: dict[str, CallTimes] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)
    running: tuple[str, str, float] | None = None
    watcher: threading.Thread | None = None

    def clear(self) -> None:
        """Forget earlier calls, at the start of a run."""
        self.times, self.reported = {}, set()

    @contextmanager
    def timed(self, function: str, argument: str) -> Iterator[None]:
        """Measure a call.

        Args:
            function: ``file.py:function``.
            argument: shown in the report of a slow call.
        """
        outer, start = self.running, time.monotonic()
        self.running = (function, argument, start)
        self._watch()
        try:
            yield
        finally:
            self.running = outer
            self.times.setdefault(function, CallTimes()).add(time.monotonic() - start)

    def _watch(self) -> None:
        # A thread, since a function that never returns must be reported too.
        if self.watcher is None or not self.watcher.is_alive():
            self.watcher = threading.Thread(target=self._report_slow_calls, daemon=True)
            self.watcher.start()

    def _report_slow_calls(self) -> None:
        last_call = time.monotonic()
        while time.monotonic() - last_call < SLOW_SECONDS:
            if self.running is not None:
                function, argument, start = self.running
                last_call = time.monotonic()
                if last_call - start >= SLOW_SECONDS and function not in self.reported:
                    self.reported.add(function)
                    echo(slow_call_text(function, argument, last_call - start), err=True)
            time.sleep(POLL_SECONDS)


def slow_call_text(function: str, argument: str, seconds: float) -> str:
    """Return the report of a slow call."""
    return (
        f"{function} has been running for {seconds:.0f} s on {argument}; the run waits for it "
        "(Ctrl-C twice stops the run; the same command resumes from the last checkpoint)"
    )


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
