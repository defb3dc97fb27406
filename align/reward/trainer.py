"""Reward model training: Bradley-Terry loss per head, with margins and AdaMix consistency; its trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from align.preference.group_trainer import GroupTrainer
from align.preference.losses.inputs import better_than
from align.preference.losses.metrics import list_accuracies
from align.preference.losses.reward import all_pairs
from align.reward.evaluation import RewardEvaluator
from align.reward.model import completion_scores
from finetune.adapters.traits import Hooks
from finetune.distributed.collectives import all_gather_object
from finetune.training.trainer import NO_HOOKS, TrainerData


@dataclass(frozen=True)
class RewardObjective:
    """The loss of a reward model, shared by the trainer and the pre-flight checks.

    Attributes:
        head_of_source: index of the head of each data source.
        center_rewards_coefficient: coefficient of the reward centering term (arXiv 2312.09244).
        margin_scale: factor on the dataset's margins; None ignores them.
        forward_passes: forward passes per batch; 2 adds the AdaMix consistency loss.
    """

    head_of_source: tuple[int, ...]
    center_rewards_coefficient: float = 0.0
    margin_scale: float | None = None
    forward_passes: int = 1

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return each group's loss (G,) and its zero-padded rewards (G, K).

        Args:
            model: a reward model in any wrapper.
            batch: a ``RewardBatch`` on the model's device.
        """
        rewards = self.rewards(model, batch)
        target_margins = None
        if self.margin_scale is not None:
            target_margins = pairwise_margins(
                batch["margins"], batch["scores"], batch["sizes"], scale=self.margin_scale
            )
        losses = bradley_terry_losses(
            rewards,
            batch["ranks"],
            margins=target_margins,
            center_rewards_coefficient=self.center_rewards_coefficient,
        )
        if self.forward_passes == 2:
            # A second forward pass: AdaMix routes each one at random (arXiv 2205.12410).
            losses = losses + consistency_losses(rewards, self.rewards(model, batch), batch["ranks"])
        return losses, rewards

    def rewards(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the rewards of each group under its head, zero-padded: (G, K)."""
        heads = torch.tensor(self.head_of_source, device=batch["sources"].device)[batch["sources"]]
        return padded_rewards(completion_scores(model, batch), batch["sizes"], heads)


def padded_rewards(scores: Tensor, group_sizes: Tensor, heads: Tensor) -> Tensor:
    """Return each group's rewards under its head, zero-padded to (G, K).

    Args:
        scores: (C, heads), completions in group order.
        group_sizes: (G,) number of completions per group.
        heads: (G,) index of the head trained on the group.

    >>> scores = torch.tensor([[1.0, 9.0], [2.0, 9.0], [9.0, 3.0], [9.0, 4.0], [9.0, 5.0]])
    >>> padded_rewards(scores, torch.tensor([2, 3]), torch.tensor([0, 1]))
    tensor([[1., 2., 0.],
            [3., 4., 5.]])
    """
    group_ids = torch.arange(len(group_sizes), device=scores.device).repeat_interleave(group_sizes)
    positions = (
        torch.arange(len(scores), device=scores.device) - (group_sizes.cumsum(0) - group_sizes)[group_ids]
    )
    head_scores = scores.gather(1, heads[group_ids][:, None]).squeeze(1)
    return scores.new_zeros(len(group_sizes), int(group_sizes.max())).index_put(
        (group_ids, positions), head_scores
    )


def pairwise_margins(margins: Tensor, scores: Tensor, group_sizes: Tensor, *, scale: float) -> Tensor:
    """Return the target margin of completion i over j: (G, K, K), 0 where the data has none.

    Args:
        margins: (G,) margin of a pair, NaN where the data has none.
        scores: (G, K), NaN where the data has none or the completion is padding.
        group_sizes: (G,) number of completions per group.
        scale: factor on the margins.
    """
    score_differences = scores[:, :, None] - scores[:, None, :]
    # A pair has its row's margin; in a longer list the score difference is the margin.
    target_margins = torch.where((group_sizes == 2)[:, None, None], margins[:, None, None], score_differences)
    # Clamped: the worse completion has no margin over the better one.
    return scale * target_margins.nan_to_num(0.0).clamp(min=0.0)


def bradley_terry_losses(
    rewards: Tensor, ranks: Tensor, *, margins: Tensor | None = None, center_rewards_coefficient: float = 0.0
) -> Tensor:
    """Return the Bradley-Terry loss averaged over each group's pairs of unequal rank: (G,).

    Args:
        rewards: (G, K).
        ranks: (G, K), 0 is the best; negative for padding.
        margins: (G, K, K), [g, i, j] is the margin of i over j; None means 0.
        center_rewards_coefficient: coefficient of the squared sum of the two rewards.
    """
    return all_pairs(
        rewards,
        -ranks,
        present=ranks >= 0,
        margins=margins,
        center_rewards_coefficient=center_rewards_coefficient,
    )


def consistency_losses(rewards: Tensor, other_rewards: Tensor, ranks: Tensor) -> Tensor:
    """Return the AdaMix consistency loss: half the symmetric KL of two forward passes' preferences, (G,).

    Averaged over the pairs of a group. For two Bernoulli variables with logits d and e it is
    (s(d) - s(e)) (d - e) / 2 (arXiv 2205.12410, equation 5; the class is which completion is better).

    Args:
        rewards: (G, K) of the first forward pass.
        other_rewards: (G, K) of the second forward pass.
        ranks: (G, K), 0 is the best; negative for padding.
    """
    better = better_than(-ranks, ranks >= 0)
    logits, other_logits = (
        reward_rows[:, :, None] - reward_rows[:, None, :] for reward_rows in (rewards, other_rewards)
    )
    divergence = (logits.sigmoid() - other_logits.sigmoid()) * (logits - other_logits) / 2
    # A group of ties has no pair: clamp makes its loss 0, not 0 / 0.
    return divergence.masked_fill(~better, 0.0).sum((-1, -2)) / better.sum((-1, -2)).clamp(min=1)


@torch.no_grad()
def mean_margins(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Return the reward margin of the better completion, averaged over each group's pairs: (G,)."""
    better = better_than(-ranks, ranks >= 0)
    margins = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~better, 0.0)
    return margins.sum((-1, -2)) / better.sum((-1, -2)).clamp(min=1)


class RewardTrainer(GroupTrainer):
    """Trainer that scores each completion once and compares all completions of a group."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data: TrainerData,
        *,
        hooks: Hooks = NO_HOOKS,
        objective: RewardObjective,
        evaluator: RewardEvaluator | None = None,
    ) -> None:
        """Set up the trainer.

        Args:
            model: base with adapter and score head.
            args: the engine's training arguments.
            data: the groups and their batching.
            hooks: the adapter's callbacks during training.
            objective: the loss.
            evaluator: evaluates the held-out comparisons for metrics.jsonl; None without them.
        """
        super().__init__(model, args, data, hooks=hooks)
        self.objective = objective
        self.evaluator = evaluator
        self.group_metrics: list[Tensor] = []

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
        # Padding groups, without an entry in `row_ids`, only keep the ranks in step: no loss, no metrics.
        num_real = len(inputs["row_ids"])
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

    def held_out_metrics(self) -> dict[str, float]:
        """Return held-out loss, accuracy and margin."""
        assert self.evaluator is not None, "evaluate_every is set with held-out rows only"
        return self.evaluator.metrics()

    def _add_group_metrics(self, rewards: Tensor, ranks: Tensor) -> None:
        """Store accuracy, margin and mean reward of each group: (3, G)."""
        present = ranks >= 0
        # Ranks with the sign changed: 0 is the best rank, and scores are higher for the better.
        accuracies = list_accuracies(rewards, -ranks, present=present)
        means = rewards.sum(1) / present.sum(1)
        self.group_metrics.append(torch.stack([accuracies, mean_margins(rewards, ranks), means]))
