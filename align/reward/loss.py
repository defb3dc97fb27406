"""Reward model losses per group: Bradley-Terry with margins, AdaMix consistency; pure tensor functions."""

import torch
from torch import Tensor

from align.preference.losses.inputs import better_than
from align.preference.losses.reward import all_pairs


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
