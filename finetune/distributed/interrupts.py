"""Reasons to stop a run early: SIGINT or SIGTERM (after the current step), NaN loss, a dead process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A signal stopped the run; a checkpoint was saved, and the message says how to resume."""


class NotFiniteError(Exception):
    """Loss or gradient is NaN or infinite; the message names the step and the rows."""


class LostProcessError(Exception):
    """A worker process died; the message names its rank and the cause."""


class SignalFlag:
    """Records the first signal; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.signal_name = ""

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Record the signal; raise KeyboardInterrupt if it is the second."""
        # Ctrl-C twice: the user does not want to wait for the end of the step.
        if self.signal_name:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(signum).name


@contextmanager
def catch_signals() -> Iterator[SignalFlag]:
    """Catch SIGINT and SIGTERM inside the block; outside the main thread nothing is caught."""
    flag = SignalFlag()
    try:
        previous_handlers = {
            signum: signal.signal(signum, flag.handle) for signum in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # Python allows signal handlers only in the main thread
        previous_handlers = {}
    try:
        yield flag
    finally:
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)
