"""The loss of comparisons, from the scores of their completions: tensors in, one number a group out."""

import torch
from torch import Tensor

from align.preference.losses.inputs import better_than
from align.preference.losses.reward import all_pairs


def reward_table(scores: Tensor, sizes: Tensor, heads: Tensor) -> Tensor:
    """Return the score that each group's own head gives to its completions: (G, K), 0 where there is none.

    Args:
        scores: (completions, heads), the groups' one behind the other.
        sizes: (G,) completions of each group.
        heads: (G,) the number of the head that learns from the group.

    >>> scores = torch.tensor([[1.0, 9.0], [2.0, 9.0], [9.0, 3.0], [9.0, 4.0], [9.0, 5.0]])
    >>> reward_table(scores, torch.tensor([2, 3]), torch.tensor([0, 1]))
    tensor([[1., 2., 0.],
            [3., 4., 5.]])
    """
    groups = torch.arange(len(sizes), device=scores.device).repeat_interleave(sizes)
    places = torch.arange(len(scores), device=scores.device) - (sizes.cumsum(0) - sizes)[groups]
    own = scores.gather(1, heads[groups][:, None]).squeeze(1)
    return scores.new_zeros(len(sizes), int(sizes.max())).index_put((groups, places), own)


def margin_table(margins: Tensor, scores: Tensor, sizes: Tensor, *, scale: float) -> Tensor:
    """Return how far each completion's reward shall be above each other's: (G, K, K), 0 where nobody said.

    Of a pair the row's own margin counts, in a longer list the difference of two completions' scores.

    Args:
        margins: (G,) margin of a pair, not a number where the data has none.
        scores: (G, K), not a number where the data has none or where there is no completion.
        sizes: (G,) completions of each group.
        scale: what margins are multiplied with.
    """
    between = scores[:, :, None] - scores[:, None, :]
    found = torch.where((sizes == 2)[:, None, None], margins[:, None, None], between)
    return scale * found.nan_to_num(0.0).clamp(min=0.0)


def comparison_losses(
    rewards: Tensor, ranks: Tensor, *, margins: Tensor | None = None, centring: float = 0.0
) -> Tensor:
    """Return the mean Bradley-Terry loss over each group's pairs of unequal rank: (G,).

    Args:
        rewards: (G, K).
        ranks: (G, K), 0 is the best; below 0 where there is no completion.
        margins: (G, K, K), at [group, i, j] that of i over j; None means 0.
        centring: coefficient of the squared sum of two rewards.
    """
    return all_pairs(rewards, -ranks, present=ranks >= 0, margins=margins, centring=centring)


def disagreements(rewards: Tensor, others: Tensor, ranks: Tensor) -> Tensor:
    """Return half the symmetric KL divergence of two passes' preferences, mean over a group's pairs: (G,).

    Of two Bernoulli variables with logits d and e that is (s(d) - s(e)) (d - e) / 2 (AdaMix, arXiv
    2205.12410, equation 5, whose classes are here which of two completions is better).

    Args:
        rewards: (G, K) of one pass.
        others: (G, K) of the other pass.
        ranks: (G, K), 0 is the best; below 0 where there is no completion.
    """
    better = better_than(-ranks, ranks >= 0)
    one, other = (table[:, :, None] - table[:, None, :] for table in (rewards, others))
    apart = (one.sigmoid() - other.sigmoid()) * (one - other) / 2
    return apart.masked_fill(~better, 0.0).sum((-1, -2)) / better.sum((-1, -2)).clamp(min=1)


@torch.no_grad()
def mean_margins(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Return by how much the better one's reward is above the other's, mean over a group's pairs: (G,)."""
    better = better_than(-ranks, ranks >= 0)
    apart = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~better, 0.0)
    return apart.sum((-1, -2)) / better.sum((-1, -2)).clamp(min=1)
