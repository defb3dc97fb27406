"""Native DPO trainer: shared-prompt groups, one loss per group, precomputed or live reference."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.dpo.collate import PreferenceCollator, PreferenceRows
from align.dpo.objective import Means, Objective, means_of
from align.dpo.scoring import Scored, score
from align.preference.group_trainer import GroupTrainer
from align.preference.starting_policy import StartingPolicy, arithmetic
from finetune.training.base_trainer import log_held_out
from finetune.training.head import output_head
from finetune.training.processes import everyones, share_in_step

HELD_OUT = "held_out_"


class PreferenceTrainer(GroupTrainer):
    """Trainer of preference losses; a row is a group, and batch sizes count groups."""

    objective: Objective
    start: StartingPolicy | None = None
    precision: str = "float32"

    @cached_property
    def head(self) -> nn.Module:
        return output_head(self.accelerator.unwrap_model(self.model))

    @cached_property
    def means(self) -> Means:
        """Return the averager of the metrics since the last log."""
        return Means()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this micro-batch's contribution to the mean loss over the groups of the optimizer step."""
        assert num_items_in_batch is not None and not return_outputs
        known = "reference" not in inputs or not inputs["reference"].isnan().any()
        assert known, "a step uses groups without precomputed reference log-probabilities"
        found = score(model, self.head, inputs, objective=self.objective, start=self.start)
        # A padding micro-batch has no row ids: it only keeps the ranks in step and counts for nothing.
        counted = len(inputs["rows"])
        self.means.add({name: values[:counted] for name, values in found.measures.items()})
        return self.step_loss(found.losses[:counted], num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's values and the metric means since the last logged loss."""
        if "loss" in logs and self.means.sums:
            means = means_of(everyones(self.means.take()))
            # The Trainer's own loss stays: it includes the adapter's penalty.
            logs |= {name: value for name, value in means.items() if name != "loss"}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the metrics on the held-out groups; no logits are gathered."""
        found = self.measure(self.eval_dataset)
        return log_held_out(self, {f"{HELD_OUT}{name}": value for name, value in found.items()})

    @torch.no_grad()
    def measure(self, rows: PreferenceRows) -> dict[str, float]:
        """Return the metric means over all groups of ``rows``, without dropout, sharded over processes."""
        means, size = Means(), self.args.per_device_train_batch_size
        training = self.model.training
        self.model.eval()
        # By length, so that a batch has little padding.
        order = np.argsort(rows.lengths, kind="stable").tolist()
        passes = [order[start : start + size] for start in range(0, len(order), size)]
        for part, counts in share_in_step(passes):
            found = self.scored(rows, part).measures
            # A padding batch only keeps the ranks in step: it is computed and not counted.
            means.add(found if counts else {name: values[:0] for name, values in found.items()})
        self.model.train(training)
        return means_of(everyones(means.take()))

    def scored(self, rows: PreferenceRows, numbers: list[int]) -> Scored:
        """Return losses and metrics of some groups, with the collator and the loss of training."""
        assert isinstance(self.data_collator, PreferenceCollator)
        batch = self.data_collator([rows[number] for number in numbers])
        device = next(self.model.parameters()).device
        on_device = {name: value.to(device) for name, value in batch.items()}
        with arithmetic(self.model, self.precision):
            return score(self.model, self.head, on_device, objective=self.objective, start=self.start)
