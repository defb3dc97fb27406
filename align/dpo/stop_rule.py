"""Early stopping on a drop of the held-out chosen log-probability."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.training.metrics import as_logged

HELD_OUT_CHOSEN_LOGPS = "eval/logps/chosen"


class ChosenLogpStop(TrainerCallback):  # type: ignore[misc]
    """Stops training once the held-out chosen log-probability dropped by more than ``max_drop`` per token."""

    def __init__(self, max_drop: float, *, initial: Callable[[], float], log: Callable[[str], None]) -> None:
        """Bind the largest allowed drop, the value before training, and the logger of the reason."""
        self.max_drop = max_drop
        self.initial = initial
        self.log = log

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        drop = self.initial() - kwargs["metrics"][as_logged(HELD_OUT_CHOSEN_LOGPS)]
        if drop > self.max_drop and not control.should_training_stop:
            # No checkpoint at this step: a run killed before its end resumes from an earlier one, evaluates
            # the same policy and stops here again.
            control.should_training_stop, control.should_save = True, False
            self.log(
                f"stopped at step {state.global_step}: held-out chosen log-probability dropped by "
                f"{drop:.3f} nats per token, more than dpo.max_chosen_logp_drop ({self.max_drop:g})"
            )
