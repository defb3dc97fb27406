"""Gradient-flow check of the first optimizer steps: every trained tensor gets a gradient, the base none."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.training.preflight import gradient_checks
from finetune.training.preflight.checks import CheckResult, first_few

CHECKED_STEPS = 5
"""Checked steps: LoRA's A has a zero gradient until B has moved, and warm-up begins at a small rate."""
FIRST_STEPS = "first steps"


class FirstStepsCheck(TrainerCallback):  # type: ignore[misc]
    """Check that every trained tensor has a nonzero gradient in one of the first steps."""

    def __init__(
        self,
        report: Callable[[CheckResult], None],
        *,
        allows_zero_gradients: bool,
        engine_takes_gradients: bool,
    ) -> None:
        """Bind the callback.

        Args:
            report: prints and records a check result, and raises if the check failed.
            allows_zero_gradients: whether to skip steps whose gradients are all zero.
            engine_takes_gradients: whether the engine removes the gradients before this callback runs (ZeRO).
        """
        self.engine_takes_gradients = engine_takes_gradients
        self.gradient_norms: gradient_checks.GradientNorms | None = None
        self.report = report
        self.allows_zero_gradients = allows_zero_gradients
        self.num_checked = 0
        self.at_zero: set[str] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Register gradient hooks if the engine removes the gradients."""
        if self.engine_takes_gradients:
            self.gradient_norms = gradient_checks.GradientNorms(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients of this step.

        Raises:
            UserError: a trained tensor got no gradient, unlike the same parameter in other layers; or a
                frozen one got one.
        """
        if self.num_checked == CHECKED_STEPS or self.at_zero == set():
            return
        model, gradient_of = kwargs["model"], self.gradient_norms or gradient_checks.stored_gradient
        parameter_groups = gradient_checks.group_parameters(model)
        states = gradient_checks.gradient_states(parameter_groups, gradient_of)
        # Such a step shows nothing about the adapter: it is not counted. After a step with gradients, a loss
        # has saturated, which the findings on the curves report.
        may_be_zero = self.allows_zero_gradients or self.at_zero is not None
        if may_be_zero and gradient_checks.NONZERO_GRADIENT not in states:
            return
        self.num_checked += 1
        # finite=False: with loss scaling (float16) the first gradients may be infinite.
        result = gradient_checks.check_gradient_flow(model, finite=False, gradient_of=gradient_of)
        # Success is reported once, below.
        if result.problem:
            self.report(result)
        if self.gradient_norms:
            self.gradient_norms.reset()
        at_zero_now = {
            group.name
            for group, state in zip(parameter_groups, states, strict=True)
            if state == gradient_checks.ZERO_GRADIENT
        }
        # At zero in every step so far: one nonzero gradient proves that a tensor trains.
        self.at_zero = at_zero_now if self.at_zero is None else self.at_zero & at_zero_now
        if self.gradient_norms and (self.num_checked == CHECKED_STEPS or not self.at_zero):
            self.gradient_norms.close()
        if not self.at_zero:
            self.report(
                CheckResult(
                    FIRST_STEPS,
                    f"every trained tensor had a nonzero gradient by step {state.global_step + 1}",
                )
            )
        elif self.num_checked == CHECKED_STEPS:
            zeros = f"{len(self.at_zero)} trained tensors had zero gradients for {CHECKED_STEPS} steps"
            names = first_few(sorted(self.at_zero))
            self.report(
                CheckResult(FIRST_STEPS, f"{zeros}, remove them from adapter.target: {names}", warned=True)
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report tensors without a gradient if training ended before the last checked step."""
        # With zero gradients in every step no step was checked, and the run fails: it has learned nothing.
        if self.at_zero and self.num_checked < CHECKED_STEPS:
            zeros = f"{len(self.at_zero)} trained tensors had zero gradients"
            self.report(
                CheckResult(
                    FIRST_STEPS, f"{zeros}; too few steps for the remaining checks: {self.num_checked}"
                )
            )
