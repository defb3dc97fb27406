"""Native reward model trainer: Bradley-Terry loss on preference groups, held-out evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from align.preference.group_trainer import GroupTrainer
from align.preference.losses.metrics import list_accuracies
from align.reward.loss import mean_margins
from align.reward.objective import RewardObjective
from finetune.distributed.collectives import all_gather_object
from finetune.training.trainer import log_held_out


class RewardTrainer(GroupTrainer):
    """Trainer that scores each completion once and compares all completions of a group."""

    objective: RewardObjective
    held_out_metrics: Callable[[], dict[str, float]]
    """Returns the held-out metrics."""
    group_metrics: list[Tensor]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this micro-batch's share of the mean loss over the optimizer step's groups."""
        assert num_items_in_batch is not None and not return_outputs
        losses, rewards = self.objective.losses(model, inputs)
        # Padding groups, without an entry in `rows`, only keep the ranks in step: no loss, no metrics.
        num_real = len(inputs["rows"])
        self._add_group_metrics(rewards.detach()[:num_real], inputs["ranks"][:num_real])
        return self.step_loss(losses[:num_real], num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the reward metrics averaged since the last log, together with the loss."""
        if "loss" in logs and self.group_metrics:
            names = ("rewards/accuracies", "rewards/margins", "rewards/mean")
            gathered = all_gather_object(torch.cat(self.group_metrics, dim=1).cpu())
            # nanmean: the accuracy of a group of ties is NaN.
            means = torch.cat(gathered, dim=1).nanmean(1).tolist()
            logs |= dict(zip(names, means, strict=True))
            self.group_metrics = []
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out metrics."""
        return log_held_out(self, self.held_out_metrics())

    def _add_group_metrics(self, rewards: Tensor, ranks: Tensor) -> None:
        """Store accuracy, margin and mean reward of each group: (3, G)."""
        present = ranks >= 0
        # Ranks with the sign changed: 0 is the best rank, and scores are higher for the better.
        accuracies = list_accuracies(rewards, -ranks, present=present)
        means = rewards.sum(1) / present.sum(1)
        self.group_metrics.append(torch.stack([accuracies, mean_margins(rewards, ranks), means]))
