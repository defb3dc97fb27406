"""Preference metrics as pure functions without gradient: margins, accuracies, KL estimates."""

import torch
from torch import Tensor

from align.preference.losses.inputs import better_than


@torch.no_grad()
def margins(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return the reward margin, chosen minus rejected: (pairs,)."""
    return chosen_rewards - rejected_rewards


@torch.no_grad()
def accuracies(chosen_rewards: Tensor, rejected_rewards: Tensor, *, tie: float = 0.0) -> Tensor:
    """Return 1 where the chosen reward is higher, 0 where it is lower, 1/2 for ties.

    A policy that equals the reference has accuracy 1/2 and not 0. Differences up to ``tie`` count as ties.
    """
    differences = chosen_rewards - rejected_rewards
    return (torch.sign(differences.masked_fill(differences.abs() <= tie, 0.0)) + 1) / 2


@torch.no_grad()
def list_accuracies(rewards: Tensor, scores: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Return the fraction of each list's pairs that the rewards rank as the scores do: (groups,).

    Pairs of equal score are excluded; a list of only ties is NaN, so that `nanmean` ignores it.

    Args:
        rewards: (groups, K).
        scores: (groups, K), higher is better.
        present: (groups, K), false where a group has fewer than K completions.
    """
    present = torch.ones_like(rewards, dtype=torch.bool) if present is None else present
    better = better_than(scores, present)
    correct = accuracies(rewards[:, :, None], rewards[:, None, :]).masked_fill(~better, 0.0)
    return correct.sum((-1, -2)) / better.sum((-1, -2))


@torch.no_grad()
def kl_k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return log pi - log ref: an unbiased, high-variance estimate of KL(pi || ref) on samples of pi.

    On completions that the policy did not sample, as in preference data, it is only a log-ratio and may be
    negative. J. Schulman, "Approximating KL divergence" (2020), k1.
    """
    return logps - reference_logps


@torch.no_grad()
def kl_k2(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return (log pi - log ref)^2 / 2: nonnegative, close to KL(pi || ref) if the two are close.

    Of the three it is the one for completions that the policy did not sample: tokens that became a thousand
    times less likely count, but do not dominate as in k3. Same source, k2.
    """
    return (logps - reference_logps) ** 2 / 2


@torch.no_grad()
def kl_k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return r - 1 - log r, r = ref / pi: on samples of pi unbiased, nonnegative, of low variance.

    Compute it per token and average: for complete sequences r overflows. Same source, k3.
    """
    log_ratios = reference_logps - logps
    # expm1: near 0, exp(x) - 1 would lose all digits.
    return torch.expm1(log_ratios) - log_ratios


@torch.no_grad()
def length_ratio(chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    """Return the ratio of chosen to rejected tokens, summed over pairs: above 1, longer completions win."""
    return chosen_lengths.sum() / rejected_lengths.sum()
