"""Gradient-flow check of the first optimizer steps: every trained tensor gets a gradient, the base none."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.training.preflight import gradients
from finetune.training.preflight.ticks import Tick, some

WATCHED = 5
"""Checked steps: warm-up may start at a rate of zero, and LoRA's A has a zero gradient until B has moved."""
NAME = "first steps"


class FirstSteps(TrainerCallback):  # type: ignore[misc]
    """Checks gradients before the optimizer step, until every trained tensor has had one."""

    def __init__(self, tell: Callable[[Tick], None], *, may_idle: bool = False, taken: bool = False) -> None:
        """Bind the callback.

        Args:
            report: prints and records a check result, and raises if the check failed.
            allows_zero_gradients: whether to skip steps whose gradients are all zero.
            engine_takes_gradients: whether the engine removes the gradients before this callback runs (ZeRO).
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
        """Register gradient hooks if the engine removes the gradients."""
        if self.taken:
            self.seen = gradients.Seen(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients of this step.

        Raises:
            UserError: a trained tensor got no gradient, unlike the same parameter in other layers; or a
                frozen one got one.
        """
        if self.steps == WATCHED or self.waiting == set():
            return
        model, of = kwargs["model"], self.seen or gradients.held
        found = gradients.groups(model)
        got = gradients.states(found, of)
        if self.may_idle and gradients.ALIVE not in got:
            return
        self.steps += 1
        # finite=False: with loss scaling (float16) the first gradients may be infinite.
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
            self.tell(
                Tick(NAME, f"every trained tensor had a nonzero gradient by step {state.global_step + 1}")
            )
        elif self.steps == WATCHED:
            zeros = f"{len(self.waiting)} trained tensors had zero gradients for {WATCHED} steps"
            names = some(sorted(self.waiting))
            self.tell(Tick(NAME, f"{zeros}, remove them from adapter.target: {names}", warned=True))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report tensors without a gradient if training ended before the last checked step."""
        if self.may_idle and not self.steps:
            self.tell(Tick(NAME, "all gradients were zero in every step: nothing was learned", warned=True))
        elif self.waiting and self.steps < WATCHED:
            zeros = f"{len(self.waiting)} trained tensors had zero gradients"
            self.tell(Tick(NAME, f"{zeros}; {self.steps} steps: too few for the remaining checks"))
