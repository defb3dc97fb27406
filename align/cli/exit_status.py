"""Exit statuses of ``llm-align``, and the messages of runs that stop."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from finetune.distributed.rank import dist_info
from finetune.recipe.silence import silence_libraries
from finetune.recipe.terminal import echo

USER_ERROR, OUR_ERROR, INTERRUPTED = 2, 1, 130
DOES_NOT_FIT = 3
"""Exit status of a plan that does not fit: no user error (2), no failure (1), but `plan && sft` must stop."""


def fail(message: str, status: int) -> None:
    """Print an error message, with the rank under a launcher, and exit."""
    dist = dist_info()
    if not dist.is_main:
        message = f"rank {dist.rank}: {message}"
    echo(f"llm-align: {message}", err=True)
    sys.exit(status)


@contextmanager
def exit_on_stop() -> Iterator[None]:
    """Turn an interrupted or failed run into a message and an exit code."""
    silence_libraries()
    from finetune.distributed.interrupts import Interrupted, LostProcessError, NotFiniteError

    try:
        yield
    except Interrupted as stop:
        fail(str(stop), INTERRUPTED)
    except LostProcessError as error:
        fail(f"{error}\n    repair:   run the same command to resume from the last checkpoint", OUR_ERROR)
    except NotFiniteError as error:
        repair = "lower train.learning_rate, or use model.precision=float32 (the run is marked as failed)"
        fail(f"{error}\n    repair:   {repair}", OUR_ERROR)
