"""What to watch while preferences are learnt, as pure functions; nothing here carries a gradient."""

import torch
from torch import Tensor

from align.preference.losses.inputs import better_than


@torch.no_grad()
def implicit_rewards(logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """Return beta (log pi - log ref), the policy's own reward (arXiv 2305.18290, equation 5)."""
    return beta * (logps - reference_logps)


@torch.no_grad()
def margins(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return by how much each chosen completion's reward is above the rejected one's: (pairs,)."""
    return chosen_rewards - rejected_rewards


@torch.no_grad()
def accuracies(chosen_rewards: Tensor, rejected_rewards: Tensor, *, tie: float = 0.0) -> Tensor:
    """Return 1 where the chosen reward is the higher one, 0 where the lower, 1/2 where both are equal.

    Equal rewards are a coin's toss: a policy that is still the reference has 1/2 and not 0. ``tie`` is the
    difference up to which they count as equal.
    """
    differences = chosen_rewards - rejected_rewards
    return (torch.sign(differences.masked_fill(differences.abs() <= tie, 0.0)) + 1) / 2


@torch.no_grad()
def list_accuracies(rewards: Tensor, scores: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Return the share of each list's pairs that the rewards put in the scores' order: (groups,).

    Pairs of equal score are left out; a list that is all ties gives NaN, so that `nanmean` passes over it.

    Args:
        rewards: (groups, K).
        scores: (groups, K), higher is better.
        present: (groups, K), false where a group has fewer than K completions.
    """
    present = torch.ones_like(rewards, dtype=torch.bool) if present is None else present
    better = better_than(scores, present)
    right = accuracies(rewards[:, :, None], rewards[:, None, :]).masked_fill(~better, 0.0)
    return right.sum((-1, -2)) / better.sum((-1, -2))


@torch.no_grad()
def kl_k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return log pi - log ref: without bias an estimate of KL(pi || ref) on samples of pi, of great variance.

    On completions that the policy did not write, as in a file of preferences, it is no divergence but a
    drift, and may well be negative. J. Schulman, "Approximating KL divergence" (2020), k1.
    """
    return logps - reference_logps


@torch.no_grad()
def kl_k2(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return (log pi - log ref)^2 / 2: never below 0, and near KL(pi || ref) where both are near each other.

    Of the three it is the one to watch on completions that the policy did not write: what the policy makes a
    thousand times less likely counts there, and does not drown all the rest as in k3. Same source, k2.
    """
    return (logps - reference_logps) ** 2 / 2


@torch.no_grad()
def kl_k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return r - 1 - log r, r = ref / pi: on samples of pi without bias, never below 0, of small variance.

    Take it per token and then the mean: over whole completions r overflows. Same source, k3.
    """
    log_ratios = reference_logps - logps
    return torch.expm1(log_ratios) - log_ratios


@torch.no_grad()
def length_ratio(chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    """Return the tokens of all chosen completions for one of all rejected ones: above 1, long answers win."""
    return chosen_lengths.sum() / rejected_lengths.sum()
