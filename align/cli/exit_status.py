"""Exit statuses of ``llm-align``, and the messages of runs that stop."""

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from finetune.distributed.rank import dist_info
from finetune.recipe.disk import OUTPUT_REPAIR, is_write_error, storage_error
from finetune.recipe.errors import LibraryError, UserError
from finetune.recipe.python_messages import command_line_messages
from finetune.recipe.silence import silence_libraries
from finetune.recipe.terminal import discard, echo
from finetune.recipe.user_calls import CALLS

USER_ERROR, OUR_ERROR, INTERRUPTED = 2, 1, 130
CLOSED_OUTPUT = 141
"""Exit status after `| head` has closed the output: that of a program that SIGPIPE ends (128 + 13)."""
TRACEBACK_HELP = "Print the traceback of an error, also of a library's."
DOES_NOT_FIT = 3
"""Exit status of a plan that does not fit: no user error (2), no failure (1), but `plan && sft` must stop."""
CHECK_FAILED = 4
"""Exit status of a run that trained to the end and did not learn, and of a verdict that is not as required.

All files are kept."""


@dataclass
class ErrorReporting:
    """How the command line reports a user error: with ``--traceback``, its traceback comes first."""

    traceback: bool = False


def traceback_option() -> click.Option:
    """Return the option ``--traceback``, which every command has."""

    def store(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        reporting = context.find_object(ErrorReporting)
        # A test may invoke a command without `main`.
        if value and reporting is not None:
            reporting.traceback = True

    return click.Option(
        ["--traceback"], is_flag=True, expose_value=False, callback=store, help=TRACEBACK_HELP
    )


def format_traceback(error: UserError) -> str:
    """Return the traceback of a library's exception, or that of the error itself."""
    # The exception may have been raised in another process: only its text arrives here.
    if isinstance(error, LibraryError):
        return error.cause["traceback"]
    return "".join(traceback.format_exception(error))


def fail(message: str, status: int) -> NoReturn:
    """Print an error message, with the rank under a launcher, and exit."""
    dist = dist_info()
    if not dist.is_main:
        message = f"rank {dist.rank}: {message}"
    try:
        echo(f"llm-align: {message}", err=True)
    # With `2>&1 | head` the errors have no reader either.
    except OSError:
        discard(sys.stderr)
    if CALLS.was_stopped and has_user_threads():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # The interpreter would wait for them without end.
        os._exit(status)
    sys.exit(status)


def has_user_threads() -> bool:
    """Return whether threads run for whose end Python waits: none of ours does."""
    return any(
        not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()
    )


class OutputGroup(click.Group):
    """A group of commands that end silently when nobody reads their output: click would exit with 1."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the command line; ``--help`` prints here."""
        with silent_when_closed():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with command_line_messages(), silent_when_closed():
            return super().invoke(ctx)


@contextmanager
def silent_when_closed() -> Iterator[None]:
    """Exit as after SIGPIPE if the output is closed.

    Raises:
        StorageError: the output is a file on a full disk.
    """
    try:
        yield
        # What is still buffered would fail when Python exits, with a message of its own.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        sys.exit(CLOSED_OUTPUT)
    except OSError as error:
        if not is_write_error(error):
            raise
        discard(sys.stdout)
        where = error.filename or "standard output"
        raise storage_error(error, where, repair=OUTPUT_REPAIR) or error from error


@contextmanager
def exit_on_stop() -> Iterator[None]:
    """Turn an interrupted or failed run into a message and an exit code."""
    silence_libraries()
    from finetune.distributed.interrupts import (
        Interrupted,
        LostProcessError,
        NotFiniteError,
        OutputClosed,
    )

    try:
        yield
    except OutputClosed as stop:
        fail(str(stop), CLOSED_OUTPUT)
    except Interrupted as stop:
        fail(str(stop), INTERRUPTED)
    except LostProcessError as error:
        fail(f"{error}\n    repair:   run the same command to resume from the last checkpoint", OUR_ERROR)
    except NotFiniteError as error:
        repair = "lower train.learning_rate, or use model.precision=float32 (the run is marked as failed)"
        fail(f"{error}\n    repair:   {repair}", OUR_ERROR)
