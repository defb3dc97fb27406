"""Watches the first optimizer steps: every trained tensor has to get a gradient, and the base none."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.training.preflight import gradients
from finetune.training.preflight.ticks import Tick, some

WATCHED = 5
"""Steps: warm-up may begin with a rate of zero, and what starts at zero (LoRA's A) follows one step later."""
NAME = "first steps"


class FirstSteps(TrainerCallback):  # type: ignore[misc]
    """Looks at the gradients before the optimizer uses them, until all have been there."""

    def __init__(self, tell: Callable[[Tick], None], *, may_idle: bool = False, taken: bool = False) -> None:
        """Bind the watch to a function that prints and records a check, and raises when it failed.

        Args:
            tell: takes a check.
            may_idle: whether a step whose gradients are all zeros is none to judge by.
            taken: whether the engine takes the gradients away before they can be looked at.
        """
        self.taken = taken
        self.seen: gradients.Seen | None = None
        self.tell = tell
        self.may_idle = may_idle
        self.steps = 0
        self.waiting: set[str] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch gradients pass by where they cannot be looked at."""
        if self.taken:
            self.seen = gradients.Seen(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients of this step.

        Raises:
            UserError: a tensor of the adapter got none where its likes did, or a frozen one got one.
        """
        if self.steps == WATCHED or self.waiting == set():
            return
        model, of = kwargs["model"], self.seen or gradients.held
        found = gradients.groups(model)
        got = gradients.states(found, of)
        if self.may_idle and gradients.ALIVE not in got:
            return
        self.steps += 1
        tick = gradients.reached(model, finite=False, of=of)
        if tick.problem:
            self.tell(tick)
        if self.seen:
            self.seen.forget()
        still = {group.name for group, state in zip(found, got, strict=True) if state == gradients.ZERO}
        self.waiting = still if self.waiting is None else self.waiting & still
        if self.seen and (self.steps == WATCHED or not self.waiting):
            self.seen.close()
        if not self.waiting:
            self.tell(Tick(NAME, f"every trained tensor had a gradient by step {state.global_step + 1}"))
        elif self.steps == WATCHED:
            zeros = f"{len(self.waiting)} trained tensors had gradients of zeros alone for {WATCHED} steps"
            names = some(sorted(self.waiting))
            self.tell(Tick(NAME, f"{zeros}, take them out of adapter.target: {names}", warned=True))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so where there were too few steps to tell."""
        if self.may_idle and not self.steps:
            self.tell(Tick(NAME, "no step had anything to learn: all gradients were zeros", warned=True))
        elif self.waiting and self.steps < WATCHED:
            zeros = f"{len(self.waiting)} trained tensors had gradients of zeros alone"
            self.tell(Tick(NAME, f"{zeros}; {self.steps} steps are too few to tell more"))
