"""Early ends of a run: SIGINT, SIGTERM (after the current step, with a checkpoint), NaN, a dead process."""

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


class Interrupt:
    """Records the first signal; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.name = ""

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Record the signal; raise KeyboardInterrupt if it is the second."""
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM inside the block; outside the main thread nothing is caught."""
    interrupt = Interrupt()
    try:
        before = {
            number: signal.signal(number, interrupt.receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # Python allows signal handlers only in the main thread
        before = {}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
