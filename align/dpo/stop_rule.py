"""Early stopping on a drop of the held-out chosen log-probability."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MEASURED = "held_out_chosen_logps"


class StopWhenChosenFalls(TrainerCallback):  # type: ignore[misc]
    """Stops training once the held-out chosen log-probability dropped by more than ``max_drop`` per token."""

    def __init__(self, most: float, *, start: Callable[[], float], tell: Callable[[str], None]) -> None:
        """Bind the largest allowed drop, the value before training, and the logger of the reason."""
        self.most = most
        self.start = start
        self.tell = tell

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        fallen = self.start() - kwargs["metrics"][MEASURED]
        if fallen > self.most and not control.should_training_stop:
            # No checkpoint at this step: a run killed before its end resumes from an earlier one, evaluates
            # the same policy and stops here again.
            control.should_training_stop, control.should_save = True, False
            self.tell(
                f"stopped at step {state.global_step}: held-out chosen log-probability dropped by "
                f"{fallen:.3f} nats per token, more than align.stop_when_chosen_falls ({self.most:g})"
            )
