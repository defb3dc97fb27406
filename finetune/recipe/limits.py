"""Numbers of a shipped recipe that are limits: they scale down to the user's rows and model.

A recipe's batch size, warm-up or held-out rows were chosen for its own data: 150 warm-up steps of 2,500 are a
start, of one step they are everything. What the user typed (on the command line, in an own recipe, in Python)
is a plain number: it is used as it is, or refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

from finetune.recipe.settings import StageSettings

LIMIT_KEYS = (
    *("data.held_out", "data.max_length", "data.max_prompt_length"),
    *("train.max_steps", "train.batch_size", "train.warmup"),
    *("train.evaluate_every", "train.checkpoint_every", "ppo.rollout_size"),
)
HELD_OUT_FRACTION = 0.1
"""Largest fraction of the rows that a recipe's number of rows holds out."""
WARMUP_FRACTION = 0.1
"""Largest fraction of the steps that a recipe's warm-up takes (alignment-handbook: 0.1)."""
MIN_STEPS = 20
"""Optimizer steps below which a batch is halved: fewer leave the weights close to where they were."""
MIN_BATCH = 4
"""Rows below which a batch is not halved: the gradient of fewer is mostly noise."""
MAX_EPOCHS_OF_STEPS = 3
"""Epochs to which a recipe's number of steps is limited: QLoRA's 1,875 steps are three on its data."""
EVALUATIONS = 4
"""Evaluations of a run that is shorter than a recipe's interval between them."""

SettingsT = TypeVar("SettingsT", bound=StageSettings)


class AtMost(int):
    """A number that nobody typed: a shipped recipe's or a default, which is an upper limit."""


@dataclass(frozen=True, slots=True)
class Change:
    """A number that was scaled: its key, the value before and after, and why."""

    key: str
    before: float
    after: float
    reason: str

    def line(self) -> str:
        return f"{self.key} {self.before:g} → {self.after:g}: {self.reason}"


def mark_limits(settings: SettingsT, is_limit: Callable[[str], bool]) -> SettingsT:
    """Return settings whose numbers that nobody typed are ``AtMost``; ``is_limit`` takes ``section.key``."""
    values = {
        key: AtMost(value)
        for key in LIMIT_KEYS
        if isinstance(value := setting(settings, key), int) and value and is_limit(key)
    }
    return with_values(settings, values)


def setting(settings: StageSettings, key: str) -> Any:
    """Return the value of ``section.key``, None if the stage has no such key."""
    section, _, name = key.partition(".")
    sections = dict(settings)
    return dict(sections[section]).get(name) if section in sections else None


def with_values(settings: SettingsT, values: Mapping[str, Any]) -> SettingsT:
    """Return settings with other values, by ``section.key``."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed = dict(settings)[section].model_copy(update={name: value})
        settings = settings.model_copy(update={section: changed})
    return settings


def limit_keys(settings: StageSettings) -> list[str]:
    """Return the keys whose values are limits."""
    return [key for key in LIMIT_KEYS if isinstance(setting(settings, key), AtMost)]


def scaled_held_out(num_rows: int, held_out: int | float) -> tuple[int | float, Change | None]:
    """Return the rows to hold out of ``num_rows``: a recipe's number is at most a tenth of them."""
    limit = max(1, round(HELD_OUT_FRACTION * num_rows))
    if not isinstance(held_out, AtMost) or held_out <= limit:
        return held_out, None
    return limit, Change("data.held_out", held_out, limit, f"a tenth of {num_rows:,} usable rows")


def fit_to_rows(
    settings: SettingsT, num_rows: int, count_steps: Callable[[SettingsT], int], *, num_parts: int = 1
) -> tuple[SettingsT, list[Change]]:
    """Return settings whose limits fit the training rows, and what was changed.

    Args:
        settings: a recipe's settings.
        num_rows: training rows.
        count_steps: returns the optimizer steps of a run with other settings.
        num_parts: runs that share one schedule (rounds of rejection sampling).
    """
    max_steps = settings.train.max_steps
    settings = _fit_max_steps(settings, num_rows)
    settings, changes = _fit_rollout(settings, num_rows)
    settings, batch_changes = _fit_batch(settings, num_rows, count_steps)
    changes += batch_changes
    steps = count_steps(settings)
    if max_steps is not None and settings.train.max_steps is None:
        reason = f"{MAX_EPOCHS_OF_STEPS} epochs of {num_rows:,} rows"
        changes.append(Change("train.max_steps", max_steps, steps, reason))
    total = num_parts * steps
    plural = "s" if total > 1 else ""
    limits = {"train.warmup": (ceil(WARMUP_FRACTION * total), f"a tenth of {total} optimizer step{plural}")}
    if settings.train.max_steps is None:  # a typed number of steps is often a trial
        reason = f"the run has {steps} optimizer steps"
        limits["train.evaluate_every"] = (max(1, steps // EVALUATIONS), reason)
        limits["train.checkpoint_every"] = (steps, reason)
    for key, (limit, reason) in limits.items():
        value = setting(settings, key)
        is_too_large = value is not None and value > (limit if key == "train.warmup" else steps)
        if isinstance(value, AtMost) and is_too_large:
            settings = with_values(settings, {key: AtMost(limit)})
            changes.append(Change(key, value, limit, reason))
    return settings, changes


def _fit_max_steps(settings: SettingsT, num_rows: int) -> SettingsT:
    """Replace a recipe's number of steps by a few epochs of the rows, if it is more than those."""
    train = settings.train
    steps = MAX_EPOCHS_OF_STEPS * ceil(num_rows / train.batch_size)
    if not isinstance(train.max_steps, AtMost) or train.max_steps <= steps:
        return settings
    return with_values(settings, {"train.max_steps": None, "train.epochs": float(MAX_EPOCHS_OF_STEPS)})


def _fit_rollout(settings: SettingsT, num_rows: int) -> tuple[SettingsT, list[Change]]:
    """Halve PPO's rollout, and the batch with it, until it is no larger than the prompts of the run."""
    rollout, batch = setting(settings, "ppo.rollout_size"), settings.train.batch_size
    if not isinstance(rollout, AtMost):
        return settings, []
    size = int(rollout)
    while size > num_rows and size % 2 == 0 and size // 2 >= MIN_BATCH:
        if (size // 2) % batch and not isinstance(batch, AtMost):
            break
        size //= 2
    if size == rollout:
        return settings, []
    changes = [Change("ppo.rollout_size", rollout, size, f"there are {num_rows:,} training prompts")]
    settings = with_values(settings, {"ppo.rollout_size": AtMost(size)})
    if size % batch:
        changes.append(Change("train.batch_size", batch, size, f"a rollout has {size} completions"))
        settings = with_values(settings, {"train.batch_size": AtMost(size)})
    return settings, changes


def _fit_batch(
    settings: SettingsT, num_rows: int, count_steps: Callable[[SettingsT], int]
) -> tuple[SettingsT, list[Change]]:
    """Halve a recipe's batch until the run has enough optimizer steps."""
    before = settings.train.batch_size
    # The user's number of steps does not depend on the batch.
    if not isinstance(before, AtMost) or settings.train.max_steps is not None:
        return settings, []
    first_steps = steps = count_steps(settings)
    # Complete micro-batches, processes and groups of completions.
    units = [
        value
        for key in ("train.micro_batch_size", "train.num_processes", "sampling.num_generations")
        if isinstance(value := setting(settings, key), int)
    ]
    size = int(before)
    while steps < MIN_STEPS and size % 2 == 0 and size // 2 >= MIN_BATCH:
        if any((size // 2) % unit for unit in units):
            break
        size //= 2
        settings = with_values(settings, {"train.batch_size": AtMost(size)})
        steps = count_steps(settings)
    if size == before:
        return settings, []
    reason = f"{steps} optimizer steps of {num_rows:,} rows instead of {first_steps}"
    return settings, [Change("train.batch_size", before, size, reason)]
