"""Metrics of preferences by hand, and the estimates of the divergence against its exact value."""

import math

import pytest
import torch

from align.preference.losses import metrics


def test_margins_and_accuracies_by_hand() -> None:
    """Margins 2, 0, -1; right, a coin's toss, wrong."""
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, 2.0, 1.0])
    assert metrics.margins(chosen, rejected).tolist() == [2.0, 0.0, -1.0]
    assert metrics.accuracies(chosen, rejected).tolist() == [1.0, 0.5, 0.0]


def test_list_accuracies_by_hand() -> None:
    """Scores 3, 2, 2, 1, rewards 4, 1, 9, 2: of the pairs 12, 13, 14, 24, 34 right are 12, 14, 34."""
    rewards = torch.tensor([[4.0, 1.0, 9.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    scores = torch.tensor([[3, 2, 2, 1], [4, 3, 2, 1]])
    assert metrics.list_accuracies(rewards, scores).tolist() == pytest.approx([3 / 5, 1 / 2])
    first_two = torch.tensor([[True, True, False, False]] * 2)
    assert metrics.list_accuracies(rewards, scores, present=first_two).tolist() == [1.0, 0.5]


def test_a_list_of_ties_has_no_accuracy() -> None:
    shares = metrics.list_accuracies(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([[1, 1], [2, 1]]))
    assert math.isnan(shares[0]) and shares.nanmean().item() == 1.0


def test_k1_and_k3_are_unbiased() -> None:
    """Over all outcomes weighed with pi, k1 and k3 give KL(pi || ref); k3 is never negative, k1 is."""
    logps = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    exact = 0.5 * math.log(2.5) + 0.2 * math.log(0.4)
    k1, k3 = metrics.kl_k1(logps, reference), metrics.kl_k3(logps, reference)
    assert (logps.exp() * k1).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (logps.exp() * k3).sum().item() == pytest.approx(exact, abs=1e-12)
    assert k1.min() < 0 and k3.min() >= 0 and k3[1] == 0
    variances = [(logps.exp() * (k - exact) ** 2).sum() for k in (k1, k3)]
    assert variances[1] < variances[0] / 3


def test_k3_of_nearly_equal_policies_is_half_the_square() -> None:
    """r - 1 - ln r is d^2 / 2 for small d: 2^-27 for 2^-13; without expm1 float32 would say 0."""
    small = metrics.kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0 + 2**-13]))
    assert small.item() == pytest.approx(2**-27, rel=0.01)


def test_length_ratio_by_hand() -> None:
    """(30 + 10) / (5 + 15) = 2: over all tokens, not the mean of 6 and 2/3."""
    assert metrics.length_ratio(torch.tensor([30, 10]), torch.tensor([5, 15])).item() == 2.0


def test_metrics_carry_no_gradient() -> None:
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    values = {
        "margins": metrics.margins(logps, logps),
        "kl_k1": metrics.kl_k1(logps, logps),
        "kl_k3": metrics.kl_k3(logps, logps),
    }
    assert [name for name, value in values.items() if value.requires_grad] == []
