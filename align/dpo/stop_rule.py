"""Stops a run whose held-out chosen completions have become too much less likely than they were."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MEASURED = "held_out_chosen_logps"


class StopWhenChosenFalls(TrainerCallback):  # type: ignore[misc]
    """Ends training after a held-out measure below the start's by more than is allowed.

    No checkpoint is written at that step: a run that is killed before it has ended goes on from an earlier
    one, measures the same, and stops again.
    """

    def __init__(self, most: float, *, start: Callable[[], float], tell: Callable[[str], None]) -> None:
        """Bind the rule: ``most`` in nats per token, the value before training, and who is told why."""
        self.most = most
        self.start = start
        self.tell = tell

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare what was measured with the start."""
        fallen = self.start() - kwargs["metrics"][MEASURED]
        if fallen > self.most and not control.should_training_stop:
            control.should_training_stop, control.should_save = True, False
            self.tell(
                f"stopped at step {state.global_step}: held-out chosen completions have lost {fallen:.3f} "
                f"nats per token, more than align.stop_when_chosen_falls ({self.most:g})"
            )
