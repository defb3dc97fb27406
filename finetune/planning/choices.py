"""Resolve ``auto`` settings: pure functions that return a value and the reason for it."""

from bisect import bisect_left
from collections.abc import Callable
from math import ceil

from finetune.planning.hardware import Hardware
from finetune.recipe.errors import Problem, UserError

TOKENS_PER_FORWARD = {"cpu": 4096, "cuda": 16384}
"""Tokens of a forward pass that saturate the device; more cost memory and gain no speed."""

GENERATED_AT_ONCE = 4
"""Tokens generated in parallel, as a multiple of a training forward pass: sampling stores no activations."""

DEFAULT_MAX_LENGTH = 2048
SHORTEST_ROW = 8
CHECKPOINTS_PER_RUN = 10

Choice = tuple[str, str]


def precision(asked: str, hardware: Hardware) -> Choice:
    """Return the dtype of the forward pass, and the reason.

    Raises:
        UserError: float16 on a CPU, which has no loss-scaled kernels worth using.
    """
    if asked == "float16" and hardware.device == "cpu":
        found = "float16 on a CPU"
        raise UserError(Problem("model.precision", found, "float32 or bfloat16", "leave it at auto"))
    if asked != "auto":
        return asked, "as requested"
    if hardware.bfloat16:
        return "bfloat16", f"{hardware.name} computes in bfloat16"
    return "float32", f"{hardware.name} has no bfloat16 arithmetic"


def max_length(asked: int | None, *, context: int, virtual_tokens: int) -> tuple[int, str]:
    """Return the maximum tokens of a row, and the reason.

    Args:
        requested: the recipe's ``data.max_length``.
        context: the model's maximum positions.
        virtual_tokens: positions that the adapter takes.

    Raises:
        UserError: the requested length or the virtual tokens do not fit the model.
    """
    room = context - virtual_tokens
    if room < SHORTEST_ROW:
        found = f"{virtual_tokens} of the model's {context} positions"
        expected = f"at most {context - SHORTEST_ROW}, so that a row of {SHORTEST_ROW} tokens fits"
        raise UserError(Problem("adapter.virtual_tokens", found, expected))
    if asked is None:
        return min(room, DEFAULT_MAX_LENGTH), f"the model has {context} positions"
    if asked > room:
        taken = f", the adapter takes {virtual_tokens}" if virtual_tokens else ""
        expected = f"at most {room}: the model has {context} positions{taken}"
        raise UserError(Problem("data.max_length", f"found {asked}", expected, f"data.max_length={room}"))
    return asked, "as requested"


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
    """Return the sequences per forward pass, and the reason.

    Args:
        requested: a number, or ``auto``.
        batch_size: sequences per optimizer step.
        longest: tokens of the longest sequence.
        hardware: the device.
        must_divide: whether the micro-batch size must divide the batch size (TRL).
        min_rows: minimum sequences per forward pass.
        fits: predicate: do N sequences fit the device's memory, by the plan? None: no plan for this model.
    """
    if isinstance(asked, int):
        return asked, "as requested"
    budget = TOKENS_PER_FORWARD[hardware.device]
    size = max(least, min(batch_size, budget // longest))
    why = f"{budget} tokens per forward pass saturate the device; the longest row has {longest}"
    if fits is not None and not fits(size):
        # Binary search for the largest size that fits: memory grows with the number of rows.
        size = max(least, bisect_left(range(1, size), True, key=lambda rows: not fits(rows)))
        enough = "more rows would not fit in memory" if fits(size) else "even this may not fit in memory"
        why = f"the longest row has {longest} tokens; {enough}"
    if whole and batch_size % size:
        fitting = [part for part in range(least, batch_size + 1) if batch_size % part == 0]
        size = max((part for part in fitting if part <= size), default=min(fitting, default=size))
        why = f"{why}; a divisor of {batch_size}"
    return size, why


def processes(asked: int | str, hardware: Hardware) -> tuple[int, str]:
    """Return the number of processes on this machine, and the reason.

    Raises:
        UserError: more processes than GPUs.
    """
    if not isinstance(asked, int):
        return hardware.count, f"one per GPU: {hardware.count}" if hardware.device == "cuda" else "a CPU"
    if hardware.device == "cuda" and asked > hardware.count:
        found, expected = f"{asked} on {hardware.count} GPUs", f"at most {hardware.count}"
        raise UserError(Problem("train.processes", found, expected, f"train.processes={hardware.count}"))
    return asked, "as requested"


def strategy(asked: str, count: int) -> Choice:
    """Return the distributed strategy of N processes, and the reason.

    Raises:
        UserError: a sharding strategy with one process, or ``single`` with several.
    """
    if asked == "auto":
        return ("single", "one process") if count == 1 else ("ddp", f"{count} processes, weights replicated")
    if asked == "single" and count > 1:
        found, repair = f"single, with {count} processes", "train.strategy=auto, or train.processes=1"
        raise UserError(Problem("train.strategy", found, "a strategy of several processes", repair))
    if asked != "single" and count == 1:
        found, repair = f"{asked}, with one process", "train.processes=2 or more, or train.strategy=auto"
        raise UserError(Problem("train.strategy", found, "several processes", repair))
    return asked, "as requested"


def optimizer_steps(rows: int, *, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Return the optimizer steps of a complete run.

    >>> optimizer_steps(100, batch_size=16, epochs=1.5, max_steps=None)
    11
    """
    return max_steps or ceil(ceil(rows / batch_size) * epochs)


def checkpoint_every(asked: int | None, *, steps: int) -> tuple[int, str]:
    """Return the steps between checkpoints, and the reason."""
    if asked is not None:
        return asked, "as requested"
    return max(1, steps // CHECKPOINTS_PER_RUN), f"{CHECKPOINTS_PER_RUN} checkpoints in {steps} steps"


def quantization(asked: str, possible: tuple[str, ...]) -> Choice:
    """Return the base's quantization, and the reason; ``supported`` lists the adapter's, preferred first."""
    return (possible[0], "the adapter's default") if asked == "auto" else (asked, "as requested")
