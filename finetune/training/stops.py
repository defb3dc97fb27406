"""How a run ends early: by a signal, after the step in hand and with a checkpoint, or by a NaN."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop; a checkpoint is written, and the message says how to go on."""


class NotFiniteError(Exception):
    """The loss or the gradient is NaN or infinite; the message names the step and the rows."""


class LostProcessError(Exception):
    """One of a run's processes ended before its work did; the message names it and the cause."""


class Interrupt:
    """Remembers that a signal came; a second one ends the program at once."""

    def __init__(self) -> None:
        self.name = ""

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, or give up waiting when it is the second."""
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM while the block lasts; outside the main thread nothing can be caught."""
    interrupt = Interrupt()
    try:
        before = {
            number: signal.signal(number, interrupt.receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # signals can be set in the main thread alone
        before = {}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
