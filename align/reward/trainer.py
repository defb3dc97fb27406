"""Native reward model trainer: Bradley-Terry loss on preference groups, held-out evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from align.preference.group_trainer import GroupTrainer
from align.preference.losses.metrics import list_accuracies
from align.reward.loss import mean_margins
from align.reward.objective import Objective
from finetune.training.base_trainer import log_held_out
from finetune.training.processes import everyones


class RewardTrainer(GroupTrainer):
    """Trainer that scores each completion once and compares all completions of a group."""

    objective: Objective
    measure: Callable[[], dict[str, float]]
    """Returns the held-out metrics."""
    seen: list[Tensor]

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
        counted = len(inputs["rows"])
        self._see(rewards.detach()[:counted], inputs["ranks"][:counted])
        return self.step_loss(losses[:counted], num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the reward metrics averaged since the last log, together with the loss."""
        if "loss" in logs and self.seen:
            names = ("accuracy", "margin", "mean_reward")
            all_seen = everyones(torch.cat(self.seen, dim=1).cpu())
            means = torch.cat(all_seen, dim=1).nanmean(1).tolist()
            logs |= dict(zip(names, means, strict=True))
            self.seen = []
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out metrics."""
        return log_held_out(self, self.measure())

    def _see(self, rewards: Tensor, ranks: Tensor) -> None:
        """Store accuracy, margin and mean reward of each group: (3, G)."""
        there = ranks >= 0
        accuracies = list_accuracies(rewards, -ranks, present=there)
        means = rewards.sum(1) / there.sum(1)
        self.seen.append(torch.stack([accuracies, mean_margins(rewards, ranks), means]))
