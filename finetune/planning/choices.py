"""What ``auto`` means: each choice is a pure function that returns a value and the reason for it."""

from bisect import bisect_left
from collections.abc import Callable
from math import ceil

from finetune.planning.hardware import Hardware
from finetune.recipe.errors import Problem, UserError

TOKENS_PER_FORWARD = {"cpu": 4096, "cuda": 16384}
"""Tokens that keep the device busy in one forward pass; more cost memory and gain nothing."""

GENERATED_AT_ONCE = 4
"""Times as many tokens are drawn at once as a training pass takes: sampling keeps no activations."""

DEFAULT_MAX_LENGTH = 2048
SHORTEST_ROW = 8
CHECKPOINTS_PER_RUN = 10

Choice = tuple[str, str]


def precision(asked: str, hardware: Hardware) -> Choice:
    """Return the floating-point type of the forward pass, and why.

    Raises:
        UserError: float16 on a CPU, which has no loss-scaled kernels worth using.
    """
    if asked == "float16" and hardware.device == "cpu":
        found = "float16 on a CPU"
        raise UserError(Problem("model.precision", found, "float32 or bfloat16", "leave it at auto"))
    if asked != "auto":
        return asked, "as asked"
    if hardware.bfloat16:
        return "bfloat16", f"{hardware.name} computes in bfloat16"
    return "float32", f"{hardware.name} has no bfloat16 arithmetic"


def max_length(asked: int | None, *, context: int, virtual_tokens: int) -> tuple[int, str]:
    """Return the tokens of a row at most, and why.

    Args:
        asked: the recipe's ``data.max_length``.
        context: positions that the model has.
        virtual_tokens: positions that the adapter takes.

    Raises:
        UserError: the asked length or the virtual tokens do not fit the model.
    """
    room = context - virtual_tokens
    if room < SHORTEST_ROW:
        found = f"{virtual_tokens} of the model's {context} positions"
        expected = f"at most {context - SHORTEST_ROW}, so that a row of {SHORTEST_ROW} tokens has room"
        raise UserError(Problem("adapter.virtual_tokens", found, expected))
    if asked is None:
        return min(room, DEFAULT_MAX_LENGTH), f"the model has {context} positions"
    if asked > room:
        taken = f", of which the adapter takes {virtual_tokens}" if virtual_tokens else ""
        expected = f"at most {room}: the model has {context} positions{taken}"
        raise UserError(Problem("data.max_length", f"found {asked}", expected, f"data.max_length={room}"))
    return asked, "as asked"


def micro_batch_size(
    asked: int | str,
    *,
    batch_size: int,
    longest: int,
    hardware: Hardware,
    whole: bool = False,
    least: int = 1,
    fits: Callable[[int], bool] | None = None,
) -> tuple[int, str]:
    """Return the sequences of a forward pass, and why.

    Args:
        asked: a number, or ``auto``.
        batch_size: sequences of an optimizer step.
        longest: tokens of the longest one.
        hardware: where it runs.
        whole: whether the steps must hold whole forward passes, all of one size.
        least: sequences that a forward pass must have.
        fits: tells whether so many fit the device's memory, by the plan; None: nothing is known of it.
    """
    if isinstance(asked, int):
        return asked, "as asked"
    budget = TOKENS_PER_FORWARD[hardware.device]
    size = max(least, min(batch_size, budget // longest))
    why = f"{budget} tokens a forward pass keep the device busy; the longest row has {longest}"
    if fits is not None and not fits(size):
        size = max(least, bisect_left(range(1, size), True, key=lambda rows: not fits(rows)))
        enough = "the plan has memory for no more" if fits(size) else "the plan has hardly memory for this"
        why = f"the longest row has {longest} tokens; {enough}"
    if whole and batch_size % size:
        fitting = [part for part in range(least, batch_size + 1) if batch_size % part == 0]
        size = max((part for part in fitting if part <= size), default=min(fitting, default=size))
        why = f"{why}; a divisor of {batch_size}"
    return size, why


def processes(asked: int | str, hardware: Hardware) -> tuple[int, str]:
    """Return how many processes this machine gives a run, and why.

    Raises:
        UserError: more than there are GPUs.
    """
    if not isinstance(asked, int):
        return hardware.count, f"one a GPU: {hardware.count}" if hardware.device == "cuda" else "one on a CPU"
    if hardware.device == "cuda" and asked > hardware.count:
        found, expected = f"{asked} on {hardware.count} GPUs", f"at most {hardware.count}"
        raise UserError(Problem("train.processes", found, expected, f"train.processes={hardware.count}"))
    return asked, "as asked"


def strategy(asked: str, count: int) -> Choice:
    """Return how ``count`` processes share the work, and why.

    Raises:
        UserError: one process is to hold a part, or several are to be one.
    """
    if asked == "auto":
        return ("single", "one process") if count == 1 else ("ddp", f"{count} processes, the weights in each")
    if asked == "single" and count > 1:
        found, repair = f"single, with {count} processes", "train.strategy=auto, or train.processes=1"
        raise UserError(Problem("train.strategy", found, "a strategy of several processes", repair))
    if asked != "single" and count == 1:
        found, repair = f"{asked}, with one process", "train.processes=2 or more, or train.strategy=auto"
        raise UserError(Problem("train.strategy", found, "several processes to share among", repair))
    return asked, "as asked"


def optimizer_steps(rows: int, *, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Return the optimizer steps of a whole run.

    >>> optimizer_steps(100, batch_size=16, epochs=1.5, max_steps=None)
    11
    """
    return max_steps or ceil(ceil(rows / batch_size) * epochs)


def checkpoint_every(asked: int | None, *, steps: int) -> tuple[int, str]:
    """Return the steps between checkpoints, and why."""
    if asked is not None:
        return asked, "as asked"
    return max(1, steps // CHECKPOINTS_PER_RUN), f"{CHECKPOINTS_PER_RUN} checkpoints in {steps} steps"


def quantization(asked: str, possible: tuple[str, ...]) -> Choice:
    """Return how the base is stored, and why; ``possible`` is what the adapter takes, its favourite first."""
    return (possible[0], "what the adapter asks for") if asked == "auto" else (asked, "as asked")
