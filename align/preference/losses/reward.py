"""Reward model losses as pure functions of rewards: Bradley-Terry on a pair, and on all pairs of a list."""

import torch
import torch.nn.functional as F
from torch import Tensor

from align.preference.losses.inputs import better_than


def bradley_terry(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margins: Tensor | None = None,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """Return -log s(r_w - r_l - m) + c (r_w + r_l)^2 for each pair.

    The first term is Llama 2's (arXiv 2307.09288, equation 2); without margins it is InstructGPT's. The
    second centers rewards at 0, which the first leaves undetermined (arXiv 2312.09244, equation 2; c is its
    eta).

    Args:
        chosen_rewards: (pairs,), the reward of the chosen completion.
        rejected_rewards: (pairs,).
        margins: (pairs,), 0 or more: annotated preference margins; None means 0.
        center_rewards_coefficient: c; 0 disables it (TRL's documentation recommends 0.01).

    Returns:
        (pairs,), not reduced.
    """
    differences = chosen_rewards - rejected_rewards
    if margins is not None:
        differences = differences - margins
    return -F.logsigmoid(differences) + center_rewards_coefficient * (chosen_rewards + rejected_rewards) ** 2


def all_pairs(
    rewards: Tensor,
    scores: Tensor,
    *,
    present: Tensor | None = None,
    margins: Tensor | None = None,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """Return the mean Bradley-Terry loss over the pairs of each list: InstructGPT's K choose 2, in one pass.

    -1 / (K choose 2) sum_{i better than j} log s(r_i - r_j); arXiv 2203.02155, equation 1. Each list has
    the same weight whatever its length, and each completion is scored once. Ties are excluded from sum and
    count; a list of only ties has loss 0.

    Args:
        rewards: (groups, K), the model's rewards.
        scores: (groups, K), the annotators' scores: higher is better, equal ones are ties.
        present: (groups, K), false for missing completions; None means all exist.
        margins: (groups, K, K), at [group, i, j] that of i over j, used where i is better; None means 0.
        center_rewards_coefficient: as in ``bradley_terry``, over the same pairs.

    Returns:
        (groups,), not reduced.
    """
    present = torch.ones_like(rewards, dtype=torch.bool) if present is None else present
    better = better_than(scores, present)
    losses = bradley_terry(
        rewards[:, :, None],
        rewards[:, None, :],
        margins=margins,
        center_rewards_coefficient=center_rewards_coefficient,
    )
    # At least 1: a list of only ties has no pairs.
    return losses.masked_fill(~better, 0.0).sum((-1, -2)) / better.sum((-1, -2)).clamp(min=1)
