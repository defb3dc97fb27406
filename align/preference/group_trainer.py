"""What trainers on groups share: a step's loss is the mean over its groups, however it is cut."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.training.base_trainer import BaseTrainer


class GroupTrainer(BaseTrainer):
    """A trainer whose rows are groups: prompts with their completions."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the forward passes of an optimizer step, and the groups in all of them, of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        groups = torch.tensor(sum(len(batch["rows"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(groups, "sum")

    def step_loss(self, losses: Tensor, num_groups: Tensor | int) -> Tensor:
        """Return this pass's share of the optimizer step's loss.

        The shares add up to the mean over all groups of the step, however it is cut into forward passes and
        over processes (whose gradients are averaged, hence the factor).

        Args:
            losses: those of this pass's groups that count, cut out of all with gradient: where none does,
                the sum is a 0 whose gradient is 0 in every trained weight.
            num_groups: of the whole step.
        """
        loss_sum = losses.sum()
        if self.hooks.penalty:  # its share of the step is that of this pass's groups
            loss_sum = loss_sum + self.hooks.penalty() * len(losses)
        loss: Tensor = loss_sum / num_groups * self.accelerator.num_processes
        return loss
