"""One run at a time in a process: random states, autocast and the working directory belong to the process."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from finetune.recipe.errors import Problem, UserError

SEPARATE_PROCESS = "wait until it has returned, or start this run in a process of its own (`llm-align ...`)"


class _UserCode(threading.local):
    """The user's code that a thread executes, "" without."""

    name = ""


class _RunSlot:
    """The run of this process, "" without; a forked child inherits this object and not the run."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pid, self.run = 0, ""


_slot, _user_code = _RunSlot(), _UserCode()


@contextmanager
def one_run(description: str) -> Iterator[None]:
    """Refuse a second run in this process inside the block.

    Args:
        description: the run, for the message of a second one.

    Raises:
        UserError: another run is in progress, or a user's code called this.
    """
    if _user_code.name:
        actual = f"called by {_user_code.name} while llm-align executes it"
        repair = 'put main programs below `if __name__ == "__main__":`; start other runs as processes'
        raise UserError(Problem("run()", actual, "no run inside a user's file or function", repair))
    with _slot.lock:
        if _slot.run and _slot.pid == os.getpid():
            actual = f"another run is in progress in this process: {_slot.run}"
            raise UserError(Problem("run()", actual, "one run at a time in a process", SEPARATE_PROCESS))
        _slot.pid, _slot.run = os.getpid(), description
    try:
        yield
    finally:
        _slot.run = ""


@contextmanager
def no_run_inside(code: str) -> Iterator[None]:
    """Refuse runs that a user's code starts inside the block.

    Args:
        code: the file or function, for the message.
    """
    outer, _user_code.name = _user_code.name, code
    try:
        yield
    finally:
        _user_code.name = outer
