"""Reasons to stop a run early: a signal or a closed output (after the step), NaN loss, a dead process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CLOSED_OUTPUT = "a closed output"
"""What stops a run in place of a signal's name."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A signal stopped the run; a checkpoint was saved, and the message says how to resume."""


class OutputClosed(Interrupted):
    """Nobody reads the run's output any more; a checkpoint was saved."""


class NotFiniteError(Exception):
    """Loss or gradient is NaN or infinite; the message names the step and the rows."""


class LostProcessError(Exception):
    """A worker process died; the message names its rank and the cause."""


class SignalFlag:
    """Records the first signal; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.signal_name = ""

    def output_closed(self) -> None:
        """Record that nobody reads the output: it stops the run like a signal."""
        self.signal_name = self.signal_name or CLOSED_OUTPUT

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Record the signal; raise KeyboardInterrupt if it is the second."""
        # Ctrl-C twice: the user does not want to wait for the end of the step. A closed terminal alone may
        # send SIGHUP twice.
        if self.signal_name and signum != signal.SIGHUP:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(signum).name


@contextmanager
def catch_signals() -> Iterator[SignalFlag]:
    """Catch SIGINT, SIGTERM and SIGHUP inside the block; outside the main thread nothing is caught."""
    flag = SignalFlag()
    caught = [signal.SIGINT, signal.SIGTERM]
    # A closed terminal; nohup ignores its signal, and so does the run then.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    try:
        previous_handlers = {signum: signal.signal(signum, flag.handle) for signum in caught}
    except ValueError:  # Python allows signal handlers only in the main thread
        previous_handlers = {}
    try:
        yield flag
    finally:
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)
