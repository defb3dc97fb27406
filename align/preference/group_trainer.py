"""Base of the trainers whose rows are groups: the loss of a step is the mean over its groups."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.training.trainer import BaseTrainer


class GroupTrainer(BaseTrainer):
    """A trainer whose rows are groups: a prompt with its completions."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return an optimizer step's micro-batches and their number of groups, summed over all processes."""
        # Trainer counts trained tokens, but preference losses are averaged over groups.
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_groups = torch.tensor(sum(len(batch["row_ids"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(num_groups, "sum")

    def step_loss(self, losses: Tensor, num_groups: Tensor | int) -> Tensor:
        """Return this micro-batch's contribution to the optimizer step's loss.

        Summed over micro-batches and averaged over processes, it is the mean over all groups of the step,
        whatever the micro-batch size and the number of processes.

        Args:
            losses: of this micro-batch's real (not padding) groups, a slice of all with gradient: if it is
                empty, the sum is 0 and its gradient is 0 in every trained weight.
            num_groups: groups of the optimizer step, over all processes (Trainer's num_items_in_batch).
        """
        loss_sum = losses.sum()
        # The penalty counts once per step, so each micro-batch adds it weighted by its number of groups.
        if self.hooks.penalty:
            loss_sum = loss_sum + self.hooks.penalty() * len(losses)
        # DDP averages gradients over processes, where we need their sum.
        loss: Tensor = loss_sum / num_groups * self.accelerator.num_processes
        return loss
