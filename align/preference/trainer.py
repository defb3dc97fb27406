"""The native engine of preference tuning: whole groups, the prompt once, one loss a group."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.preference.collate import PreferenceCollator, PreferenceRows
from align.preference.objective import Means, Objective
from align.preference.scoring import Scored, StartingPolicy, arithmetic, score
from finetune.training.base_trainer import BaseTrainer, log_held_out
from finetune.training.head import output_head

HELD_OUT = "held_out_"


class PreferenceTrainer(BaseTrainer):
    """Learns from comparisons; rows are groups, and a batch's size counts groups."""

    objective: Objective
    start: StartingPolicy | None = None
    precision: str = "float32"

    @cached_property
    def head(self) -> nn.Module:
        """Return the model's output embeddings."""
        return output_head(self.accelerator.unwrap_model(self.model))

    @cached_property
    def means(self) -> Means:
        """Return the measures of the groups since the last line of metrics."""
        return Means()

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return the forward passes of an optimizer step, and the groups in all of them, of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        groups = torch.tensor(sum(len(batch["rows"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(groups, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the summed loss of this pass's groups over the number of groups in the whole optimizer step.

        These quotients add up to the mean over all groups of the step, however it is cut into forward
        passes and over processes (whose gradients are averaged, hence the factor).
        """
        assert num_items_in_batch is not None and not return_outputs
        known = "reference" not in inputs or not inputs["reference"].isnan().any()
        assert known, "a step looks at groups that the reference was not computed for"
        found = score(model, self.head, inputs, objective=self.objective, start=self.start)
        self.means.add(found.measures)
        loss_sum = found.losses.sum()
        if self.hooks.penalty:  # its share of the step is that of this pass's groups
            loss_sum = loss_sum + self.hooks.penalty() * len(inputs["rows"])
        loss: Tensor = loss_sum / num_items_in_batch * self.accelerator.num_processes
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the engine says, and the means of what was watched since it last spoke of a loss."""
        if "loss" in logs and self.means.groups:
            means = self.means.take(self.accelerator.reduce(self.means.totals(), "sum"))
            logs |= {name: value for name, value in means.items() if name != "loss"}  # with the penalty
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the measures on the held-out groups; no logits are kept."""
        found = self.measure(self.eval_dataset)
        return log_held_out(self, {f"{HELD_OUT}{name}": value for name, value in found.items()})

    @torch.no_grad()
    def measure(self, rows: PreferenceRows) -> dict[str, float]:
        """Return the means of what is watched over all groups of ``rows``, without dropout."""
        means, size = Means(), self.args.per_device_train_batch_size
        training = self.model.training
        self.model.eval()
        order = np.argsort(rows.lengths, kind="stable").tolist()
        for start in range(0, len(order), size):
            means.add(self.scored(rows, order[start : start + size]).measures)
        self.model.train(training)
        return means.take(means.totals())

    def scored(self, rows: PreferenceRows, numbers: list[int]) -> Scored:
        """Return losses and measures of some groups, by the collator and the loss of training."""
        assert isinstance(self.data_collator, PreferenceCollator)
        batch = self.data_collator([rows[number] for number in numbers])
        device = next(self.model.parameters()).device
        on_device = {name: value.to(device) for name, value in batch.items()}
        with arithmetic(self.model, self.precision):
            return score(self.model, self.head, on_device, objective=self.objective, start=self.start)
