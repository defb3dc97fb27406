"""Resolve ``auto`` settings: each function returns a value and the reason for it; without torch."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from math import ceil

from finetune.distributed.hardware import SAFE_FRACTION, Hardware
from finetune.planner.estimate import ObjectiveKind, Workload, estimate, recipe_workload
from finetune.recipe.base_config import StoredQuantization, load_stored_quantization
from finetune.recipe.discovery import adapter_traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.limits import AtMost
from finetune.recipe.settings import StageSettings

TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 16384}
"""Tokens of a forward pass that saturate the device; more cost memory and gain no speed.

Measured on two cores with a 135M model in bfloat16, 128 rows of up to 468 tokens: 8 rows per pass took 176 s,
4 rows 168 s, 2 rows 191 s (peak memory 10.8, 6.6 and 4.7 GiB).
"""
GENERATION_TOKENS = {"cpu": 16384, "cuda": 65536}
"""Tokens generated in parallel: sampling stores no activations."""

DEFAULT_MAX_LENGTH = 2048
NO_POSITION_LIMIT = 2**31
"""Positions of a model whose config.json has no maximum: it has a recurrent state, or biases by distance."""
MIN_ROW_TOKENS = 8
CHECKPOINTS_PER_RUN = 10

OBJECTIVE_OF_CONFIG: dict[str, ObjectiveKind] = {
    "SFTConfig": "likelihood",
    "DPOConfig": "comparison",
    "KTOConfig": "comparison",
    "RLOOConfig": "comparison",
    "GRPOConfig": "comparison",
    "RewardConfig": "scores",
}
"""The planner's objective (loss on the last hidden states) of a stage, by its TRL config; TRL has no PPO."""

Choice = tuple[str, str]


def precision(requested: str, hardware: Hardware) -> Choice:
    """Return the dtype of the forward pass, and the reason."""
    if requested != "auto":
        return requested, "as requested"
    if hardware.bfloat16:
        return "bfloat16", f"{hardware.name} computes in bfloat16"
    return "float32", f"{hardware.name} has no bfloat16 arithmetic"


def max_length(requested: int | None, *, context: int, virtual_tokens: int) -> tuple[int, str]:
    """Return the maximum tokens of a row, and the reason.

    Args:
        requested: the recipe's ``data.max_length``.
        context: the model's maximum positions.
        virtual_tokens: positions that the adapter takes.

    Raises:
        UserError: the requested length or the virtual tokens do not fit the model.
    """
    available = context - virtual_tokens
    if available < MIN_ROW_TOKENS:
        actual = f"{virtual_tokens} of the model's {context} positions"
        expected = f"at most {context - MIN_ROW_TOKENS}, so that a row of {MIN_ROW_TOKENS} tokens fits"
        raise UserError(Problem("adapter.virtual_tokens", actual, expected))
    if requested is None:
        unlimited = context >= NO_POSITION_LIMIT
        reason = "the model has no maximum" if unlimited else f"the model has {context} positions"
        return min(available, DEFAULT_MAX_LENGTH), reason
    if requested > available:
        taken = f", the adapter takes {virtual_tokens}" if virtual_tokens else ""
        if isinstance(requested, AtMost):
            return available, f"{requested} in the recipe; the model has {context} positions{taken}"
        expected = f"at most {available}: the model has {context} positions{taken}"
        raise UserError(
            Problem("data.max_length", f"found {requested}", expected, f"data.max_length={available}")
        )
    return requested, "as requested"


def micro_batch_size(
    requested: int | str,
    *,
    batch_size: int,
    longest: int,
    hardware: Hardware,
    must_divide: bool = False,
    min_rows: int = 1,
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
    if isinstance(requested, int):
        return requested, "as requested"
    budget = TOKENS_PER_FORWARD[hardware.device]
    size = max(min_rows, min(batch_size, budget // longest))
    reason = f"{budget} tokens per forward pass saturate the device; the longest row has {longest}"
    if fits is not None and not fits(size):
        # Binary search, as memory grows with the rows: the index of the first size that does not fit is the
        # largest size that does.
        size = max(min_rows, bisect_left(range(1, size), True, key=lambda rows: not fits(rows)))
        memory_note = "more rows would not fit in memory" if fits(size) else "even this may not fit in memory"
        reason = f"the longest row has {longest} tokens; {memory_note}"
    if must_divide and batch_size % size:
        divisors = [divisor for divisor in range(min_rows, batch_size + 1) if batch_size % divisor == 0]
        size = max((divisor for divisor in divisors if divisor <= size), default=min(divisors, default=size))
        reason = f"{reason}; a divisor of {batch_size}"
    return size, reason


def num_processes(requested: int | str, hardware: Hardware) -> tuple[int, str]:
    """Return the number of processes on this machine, and the reason.

    Raises:
        UserError: more processes than GPUs.
    """
    if not isinstance(requested, int):
        return (
            hardware.device_count,
            f"one per GPU: {hardware.device_count}" if hardware.device == "cuda" else "a CPU",
        )
    if hardware.device == "cuda" and requested > hardware.device_count:
        actual, expected = f"{requested} on {hardware.device_count} GPUs", f"at most {hardware.device_count}"
        raise UserError(
            Problem("train.num_processes", actual, expected, f"train.num_processes={hardware.device_count}")
        )
    return requested, "as requested"


def strategy(requested: str, world_size: int) -> Choice:
    """Return the distributed strategy of N processes, and the reason."""
    if requested == "auto":
        return (
            ("single", "one process")
            if world_size == 1
            else ("ddp", f"{world_size} processes, weights replicated")
        )
    return requested, "as requested"


def optimizer_steps(rows: int, *, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Return the optimizer steps of a complete run.

    >>> optimizer_steps(100, batch_size=16, epochs=1.5, max_steps=None)
    11
    """
    return max_steps or ceil(ceil(rows / batch_size) * epochs)


def warmup_steps(requested: float, *, steps: int) -> int:
    """Return the warm-up steps of a run: at most all of its steps.

    Args:
        requested: steps (1, 2, ...), or a fraction of all steps (below 1).
        steps: optimizer steps of the run.

    >>> [warmup_steps(requested, steps=20) for requested in (0, 0.03, 5, 150)]
    [0, 1, 5, 20]
    """
    return min(steps, int(requested) if requested >= 1 else ceil(requested * steps))


def checkpoint_every(requested: int | None, *, steps: int) -> tuple[int, str]:
    """Return the steps between checkpoints, and the reason."""
    if requested is not None:
        return requested, "as requested"
    return max(1, steps // CHECKPOINTS_PER_RUN), f"{CHECKPOINTS_PER_RUN} checkpoints in {steps} steps"


def quantization(
    requested: str, supported: tuple[str, ...], stored: StoredQuantization | None = None
) -> Choice:
    """Return the base's quantization, and the reason.

    Args:
        requested: the recipe's ``model.quantization``.
        supported: the adapter's quantizations, preferred first.
        stored: how the base's own files store it, which loading keeps.

    Raises:
        UserError: the base is stored in a quantization that is unknown, not the requested one, or not
            supported by the adapter.
    """
    if stored is None:
        return (supported[0], "the adapter's default") if requested == "auto" else (requested, "as requested")
    stored.check(requested, supported)
    return stored.quantization, f"the base is stored in {stored}"


def precision_and_quantization(settings: StageSettings, hardware: Hardware) -> dict[str, Choice]:
    """Return a recipe's precision and quantization on some hardware, each with its reason.

    Raises:
        UserError: the base's stored quantization contradicts the recipe.
    """
    model, supported = settings.model, adapter_traits(settings.adapter.method).quantization
    stored = load_stored_quantization(model.base, model.revision)
    return {
        "model.precision": precision(model.precision, hardware),
        "model.quantization": quantization(model.quantization, supported, stored),
    }


def batch_fits(
    settings: StageSettings,
    *,
    precision: str,
    quantization: str,
    longest: int,
    num_processes: int,
    strategy: str,
    gpu_bytes: int,
) -> Callable[[int], bool] | None:
    """Return a predicate: do N rows fit the GPU? None if there is no plan for this architecture.

    Args:
        settings: the recipe's sections.
        precision: of the loaded model.
        quantization: of the loaded model.
        longest: tokens of the longest row; all of them are assumed to be predicted.
        num_processes: number of processes.
        strategy: distributed strategy.
        gpu_bytes: bytes available on a GPU.
    """
    try:
        workload = recipe_workload(
            settings,
            precision=precision,
            quantization=quantization,
            device="cuda",
            processes=num_processes,
            strategy=strategy,
        )
    # The planner does not know this architecture; the run itself may still.
    except UserError:
        return None
    return lambda rows: _peak_bytes(settings, workload, rows, longest) <= SAFE_FRACTION * gpu_bytes


def _peak_bytes(settings: StageSettings, workload: Workload, rows: int, longest: int) -> int:
    objective: ObjectiveKind = "ppo" if "ppo" in dict(settings) else OBJECTIVE_OF_CONFIG[settings.TRL_CONFIG]
    batch_workload = replace(
        workload,
        objective=objective,
        rows=rows,
        seq_len=longest,
        predicted=rows * longest,
        completions=2 * rows if objective != "likelihood" else 0,
        heads=1 if objective in ("scores", "ppo") else 0,
        masked=rows > 1,
        accumulation_steps=ceil(settings.train.batch_size / (rows * workload.processes)),
    )
    return estimate(batch_workload).micro_batch_peak.total
