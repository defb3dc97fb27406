"""The learning rate schedule of all stages and engines: linear warm-up, then linear or cosine decay.

transformers' schedules begin warm-up at a rate of 0, so that the first step trains nothing, and their warm-up
may be longer than the run. Here no step has a rate of 0: warm-up step k of W has k/W of the peak, and the
decay reaches 0 only after the last step. Without warm-up the rates are those of transformers.
"""

import math
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer

from finetune.recipe.errors import Problem
from finetune.recipe.limits import MIN_STEPS
from finetune.recipe.settings import TrainSettings
from finetune.training.auto_values import warmup_steps
from finetune.training.preflight.checks import CheckResult, failed


@dataclass(frozen=True, slots=True)
class SchedulePart:
    """The part of a schedule that one training run covers; a round of rejection sampling is a part.

    Attributes:
        index: index of the part.
        num_parts: number of parts. Each covers the same share of the schedule, however many steps it has.
        first_part_steps: optimizer steps of the first part, the unit of warm-up; None in the first part.
    """

    index: int = 0
    num_parts: int = 1
    first_part_steps: int | None = None


COMPLETE_SCHEDULE = SchedulePart()


@dataclass(frozen=True, slots=True)
class LearningRateSchedule:
    """A schedule; ``factor`` is a callable for ``LambdaLR``.

    Attributes:
        decay: ``linear``, ``cosine`` or ``constant``.
        num_steps: optimizer steps of the complete schedule.
        warmup: warm-up steps W, at most ``num_steps``.
        first_step: the schedule's steps before this run.
    """

    decay: str
    num_steps: int
    warmup: float
    first_step: int = 0

    def factor(self, step: int) -> float:
        """Return the factor of the peak learning rate at an optimizer step of the run, from 0.

        >>> schedule = LearningRateSchedule("linear", num_steps=6, warmup=2)
        >>> [schedule.factor(step) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        step += self.first_step
        if step < self.warmup:
            return min(1.0, (step + 1) / self.warmup)
        # The last step of all may be asked for once it is done: its factor is used by no step.
        decay_steps = max(1, self.num_steps - self.warmup)
        if self.decay == "linear":
            return max(0.0, (self.num_steps - step) / decay_steps)
        if self.decay == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - self.warmup) / decay_steps))))
        return 1.0


def build_schedule(
    decay: str, warmup: float, num_steps: int, part: SchedulePart = COMPLETE_SCHEDULE
) -> LearningRateSchedule:
    """Return the schedule of a run.

    Args:
        decay: ``linear``, ``cosine`` or ``constant``.
        warmup: steps, or a fraction of all steps (below 1).
        num_steps: optimizer steps of this run.
        part: the part of the schedule that the run covers.
    """
    first_part_steps = part.first_part_steps or num_steps
    num_warmup_steps = warmup_steps(warmup, steps=part.num_parts * first_part_steps)
    return LearningRateSchedule(
        decay,
        num_steps=part.num_parts * num_steps,
        # In steps of this part, which may have more or fewer of them than the first one.
        warmup=num_warmup_steps * num_steps / first_part_steps,
        first_step=part.index * num_steps,
    )


def schedule_record(train: TrainSettings, num_steps: int) -> dict[str, Any]:
    """Return run.json's section on the schedule: what a longer run must have in common with this one."""
    warmup = warmup_steps(train.warmup, steps=num_steps)
    decay = train.lr_schedule
    return {"decay": decay, "warmup": warmup, "steps": num_steps, "batch_size": int(train.batch_size)}


class ScheduledTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with this schedule; the base of the trainers of both engines."""

    schedule_part = COMPLETE_SCHEDULE
    lr_scheduler: LRScheduler | None

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Return the schedule of the training arguments, created at the first call."""
        if self.lr_scheduler is None:
            schedule = build_schedule(
                str(self.args.lr_scheduler_type.value),
                self.args.warmup_steps,
                num_training_steps,
                self.schedule_part,
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedule.factor)
        return self.lr_scheduler


def check_schedule(
    train: TrainSettings, num_steps: int, part: SchedulePart = COMPLETE_SCHEDULE
) -> list[CheckResult]:
    """Check that a run has enough steps, and that its intervals are shorter; empty if so.

    Args:
        train: settings whose limits are fitted: what is too large here, the user typed.
        num_steps: optimizer steps of this run.
        part: the part of the schedule that the run covers; only the first one is checked.
    """
    if part.index:
        return []
    results = check_warmup(train, part.num_parts * num_steps)
    if num_steps < MIN_STEPS and train.max_steps is None:
        epochs = ceil(train.epochs * MIN_STEPS / num_steps)
        detail = f"only {num_steps} optimizer step{'s' * (num_steps > 1)}: the model may change little"
        repair = f"train.epochs={epochs}, a smaller train.batch_size ({train.batch_size}), or more rows"
        results.append(CheckResult("steps", f"{detail}; {repair}", warned=True))
    for key, value in (("evaluate_every", train.evaluate_every), ("log_every", train.log_every)):
        if value is not None and value > num_steps:
            detail = f"train.{key}={value} is more than the run's {num_steps} steps: it has no effect"
            results.append(
                CheckResult("intervals", f"{detail}; train.{key}={max(1, num_steps // 4)}", warned=True)
            )
    return results


def check_warmup(train: TrainSettings, num_steps: int) -> list[CheckResult]:
    """Check that warm-up is not longer than the run; empty if it is not."""
    if train.warmup <= num_steps:
        return []
    actual = f"{train.warmup} steps, but the run has {num_steps} optimizer step{'s' * (num_steps > 1)}"
    repair = "train.warmup=0.1 is a tenth of any run; or more steps (train.epochs, train.max_steps)"
    return [failed("warmup", Problem("train.warmup", actual, "at most the steps of the run", repair))]
