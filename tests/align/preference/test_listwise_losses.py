"""Losses on ranked lists: numbers by hand, ties, lists of unequal length, identities, gradients, extremes."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from preference_batches import random_lists
from torch import Tensor

from align.preference.losses import listwise, pairwise
from align.preference.losses.catalog import all_losses
from align.preference.losses.inputs import Lists, LossOutput

LISTWISE = [name for name, loss in all_losses().items() if loss.takes == "Lists"]


def call(name: str, lists: Lists, **settings: float) -> LossOutput:
    return all_losses()[name].function()(lists, **settings)


def one_list(logps: list[float], scores: list[float], lengths: list[int] | None = None) -> Lists:
    """Return a group of completions; without lengths, of one token each; the reference gives log-prob 0."""
    values = torch.tensor([logps], dtype=torch.float64)
    sizes = torch.tensor([lengths or [1] * len(logps)])
    return Lists(values, sizes, torch.tensor([scores], dtype=torch.float64), torch.zeros_like(values))


def reordered(lists: Lists, order: list[int]) -> Lists:
    fields = (lists.logps, lists.lengths, lists.scores, lists.reference_logps)
    return Lists(*[None if field is None else field[:, order] for field in fields])


def test_plackett_luce_by_hand() -> None:
    """h = ln 4, ln 3, ln 1 in the order of the scores, beta 1: P = 4/8 x 3/4 x 1/1 = 3/8."""
    lists = one_list([math.log(3), math.log(1), math.log(4)], [2, 1, 3])
    output = listwise.plackett_luce(lists, beta=1.0)
    assert output.losses.tolist() == [pytest.approx(-math.log(3 / 8))]
    assert output.chosen_rewards.tolist() == [pytest.approx(math.log(4))]
    assert output.rejected_rewards.tolist() == [0.0]


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one() -> None:
    lists = random_lists(3, 4)
    total = torch.zeros(3, dtype=torch.float64)
    for order in permutations(range(4)):
        scores = torch.tensor([order], dtype=torch.float64).expand(3, 4)
        total += torch.exp(-listwise.plackett_luce(replace(lists, scores=scores)).losses)
    assert total.tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def test_plackett_luce_of_two_is_dpo() -> None:
    lists = random_lists(8, 2, seed=2)
    both = listwise.plackett_luce(lists), pairwise.dpo(lists.pairs())
    for first, second in zip(*both, strict=True):
        assert torch.allclose(first, second, atol=1e-12)


def test_where_policy_and_reference_are_one_every_ranking_of_four_is_as_likely() -> None:
    """1 / 4!, so ln 24."""
    lists = random_lists(5, 4)
    same = replace(lists, reference_logps=lists.logps)
    assert listwise.plackett_luce(same).losses.tolist() == pytest.approx([math.log(24)] * 5, abs=1e-12)


def test_rrhf_by_hand() -> None:
    """p = -1, -2, -0.5, scores 3, 2, 1: the 3rd tops the 1st by 0.5, the 2nd by 1.5; best -1: 2 + 1."""
    lists = one_list([-4.0, -4.0, -1.0], [3, 2, 1], [4, 2, 2])
    output = listwise.rrhf(lists)
    assert output.losses.tolist() == [pytest.approx(3.0)]
    assert listwise.rrhf(lists, rank_weight=100.0).losses.tolist() == [pytest.approx(201.0)]
    assert listwise.rrhf(lists, nll_weight=0.0).losses.tolist() == [pytest.approx(2.0)]
    assert output.chosen_rewards.tolist() == [-1.0] and output.rejected_rewards.tolist() == [-0.5]


def test_pro_by_hand() -> None:
    """p = -1, -2, -0.5, scores 3, 2.5, 1.

    The first: t = 0.5 and 2, its own 2: e^-2 / (e^-2 + e^-1 + e^-1). The second: t = 1.5, its own too:
    e^-3 / (e^-3 + e^-0.75). Likelihood: 0.05 x (3 - 1)^2 x 4 = 0.8.
    """
    lists = one_list([-4.0, -4.0, -1.0], [3, 2.5, 1], [4, 2, 2])
    first = math.exp(-2) / (math.exp(-2) + math.exp(-1) + math.exp(-1))
    second = math.exp(-3) / (math.exp(-3) + math.exp(-0.75))
    expected = -math.log(first) - math.log(second) + 0.8
    assert listwise.pro(lists).losses.tolist() == [pytest.approx(expected)]


def test_pro_of_two_one_apart_is_simpo() -> None:
    """t = 1 on both sides: the logistic loss on log-probabilities per token, with beta 1 and no margin."""
    lists = replace(random_lists(8, 2), scores=torch.tensor([[0.0, 1.0]] * 8, dtype=torch.float64))
    simpo = pairwise.simpo(lists.pairs(), beta=1.0, margin=0.0).losses
    assert torch.allclose(listwise.pro(lists, nll_weight=0.0).losses, simpo, atol=1e-12)


def test_ties_are_no_preference() -> None:
    """Scores 2, 1, 1: the last two are not compared, only the first with both."""
    h = [0.3, -0.2, 0.9]
    lists = one_list(h, [2, 1, 1])
    alone = math.log(sum(math.exp(x) for x in h)) - h[0]
    assert listwise.plackett_luce(lists, beta=1.0).losses.tolist() == [pytest.approx(alone)]
    assert listwise.pro(lists, nll_weight=0.0).losses.tolist() == [pytest.approx(alone)]
    # Only 0.9 - 0.3 is too low for RRHF: the first under the third.
    assert listwise.rrhf(lists, nll_weight=0.0).losses.tolist() == [pytest.approx(0.6)]
    assert lists.pairs().chosen_logps.tolist() == [0.3, 0.3]
    assert lists.pairs().rejected_logps.tolist() == [-0.2, 0.9]


@pytest.mark.parametrize("name", LISTWISE)
def test_list_of_ties_has_no_ranking_term(name: str) -> None:
    lists = one_list([-1.0, -2.0, -3.0], [5, 5, 5])
    lists.logps.requires_grad_()
    weights = {key: 0.0 for key in all_losses()[name].defaults if key == "nll_weight"}
    output = call(name, lists, **weights)
    output.losses.sum().backward()
    assert output.losses.tolist() == [0.0]
    assert lists.logps.grad is not None and lists.logps.grad.tolist() == [[0.0, 0.0, 0.0]]
    # All are the best and the worst: the mean reward on both sides, a margin of 0.
    assert torch.equal(output.chosen_rewards, output.rejected_rewards)
    assert lists.pairs().chosen_logps.shape == (0,)


def test_tied_best_completions_share_the_likelihood() -> None:
    """Best: -1 and -3 per token, mean -2; nothing is too low."""
    lists = one_list([-1.0, -3.0, -9.0], [4, 4, 0])
    assert listwise.rrhf(lists).losses.tolist() == [2.0]


@pytest.mark.parametrize("name", LISTWISE)
def test_order_of_completions_does_not_matter(name: str) -> None:
    lists = random_lists(6, 4, seed=4)
    ties = replace(lists, scores=lists.scores.clamp(max=2.0))
    for case in (lists, ties):
        expected = call(name, case)
        for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
            for first, second in zip(call(name, reordered(case, order)), expected, strict=True):
                assert torch.allclose(first, second, atol=1e-12)


@pytest.mark.parametrize("name", LISTWISE)
@pytest.mark.parametrize("absent", [0.0, 1e30, float("nan")])
def test_padded_lists_match_unpadded_ones(name: str, absent: float) -> None:
    """A list of 3 padded to 5: its loss, rewards and gradient are those of the 3, whatever fills the rest."""
    lists = random_lists(4, 3, seed=5)
    lists.logps.requires_grad_()
    expected = call(name, lists)
    (slope,) = torch.autograd.grad(expected.losses.sum(), lists.logps)

    def padded(values: Tensor, filler: float) -> Tensor:
        return torch.cat([values, values.new_full((4, 2), filler)], -1)

    assert lists.reference_logps is not None
    wide = Lists(
        padded(lists.logps.detach(), absent).requires_grad_(),
        padded(lists.lengths, 0),
        padded(lists.scores, 99.0),
        padded(lists.reference_logps, absent),
    )
    output = call(name, wide)
    for first, second in zip(output, expected, strict=True):
        assert torch.allclose(first, second, atol=1e-12)
    (wide_slope,) = torch.autograd.grad(output.losses.sum(), wide.logps)
    assert torch.allclose(wide_slope[:, :3], slope, atol=1e-12) and not wide_slope[:, 3:].any()


def test_plackett_luce_gradient_in_closed_form() -> None:
    """dL/dh_k = beta (k's shares of the denominators that contain it, minus 1), without the last one's."""
    lists = one_list([0.5, -1.0, 2.0], [3, 2, 1])
    lists.logps.requires_grad_()
    listwise.plackett_luce(lists, beta=0.5).losses.sum().backward()
    a, b, c = (math.exp(0.5 * h) for h in (0.5, -1.0, 2.0))
    expected = [a / (a + b + c) - 1, b / (a + b + c) + b / (b + c) - 1, c / (a + b + c) + c / (b + c)]
    assert lists.logps.grad is not None
    assert lists.logps.grad[0].tolist() == pytest.approx([0.5 * x for x in expected], abs=1e-12)


def test_rrhf_gradient_in_closed_form() -> None:
    """p = -1, -2, -0.5: pairs (1, 3) and (2, 3) are too low; the likelihood adds -1 to the first."""
    lists = one_list([-1.0, -2.0, -0.5], [3, 2, 1])
    lists.logps.requires_grad_()
    listwise.rrhf(lists).losses.sum().backward()
    assert lists.logps.grad is not None and lists.logps.grad.tolist() == [[-2.0, -1.0, 2.0]]


@pytest.mark.parametrize("name", LISTWISE)
def test_gradcheck(name: str) -> None:
    lists = random_lists(3, 4, seed=6)

    def values(logps: Tensor) -> Tensor:
        return call(name, replace(lists, logps=logps)).losses

    assert torch.autograd.gradcheck(values, (lists.logps.requires_grad_(),))


@pytest.mark.parametrize("name", LISTWISE)
def test_extreme_log_probabilities_stay_finite(name: str) -> None:
    logps = torch.tensor([[0.0, -1e4, 0.0, -1e4], [-1e4, 0.0, -1e4, -1e4]], requires_grad=True)
    ones, scores = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 2, 3, 3], [4, 3, 2, 1]])
    output = call(name, Lists(logps, ones, scores, torch.zeros(2, 4)))
    output.losses.sum().backward()
    assert output.losses.isfinite().all()
    assert logps.grad is not None and logps.grad.isfinite().all()


def test_pairs_of_a_list_follow_better() -> None:
    """Scores 1, 3, 2 of one group, 5, 5, 0 of another: three pairs and two, as `better` has them."""
    lists = Lists(
        torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]),
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        torch.tensor([[1, 3, 2], [5, 5, 0]]),
    )
    pairs = lists.pairs()
    assert lists.better.nonzero().tolist() == [[0, 1, 0], [0, 1, 2], [0, 2, 0], [1, 0, 2], [1, 1, 2]]
    assert pairs.chosen_logps.tolist() == [-2.0, -2.0, -3.0, -4.0, -5.0]
    assert pairs.rejected_lengths.tolist() == [1, 3, 1, 6, 6]
    assert pairs.reference_chosen_logps is None
