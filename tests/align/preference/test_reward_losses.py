"""Losses of a reward model: numbers by hand, all pairs at once against one by one, gradients, extremes."""

import math

import pytest
import torch

from align.preference.losses.reward import all_pairs, bradley_terry


def random_lists(groups: int = 4, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    rewards = 3 * torch.randn(groups, size, generator=generator, dtype=torch.float64)
    return rewards, torch.randint(0, 4, (groups, size), generator=generator)


def test_bradley_terry_by_hand() -> None:
    """r = 2, 0.5: ln(1 + e^-1.5) = 0.2014133; margin 1: ln(1 + e^-0.5) = 0.4740770; 0.01 x 2.5^2 = 0.0625."""
    chosen, rejected = torch.tensor([2.0]), torch.tensor([0.5])
    assert bradley_terry(chosen, rejected).item() == pytest.approx(0.2014133)
    with_margin = bradley_terry(chosen, rejected, margins=torch.tensor([1.0]))
    assert with_margin.item() == pytest.approx(0.4740770)
    assert bradley_terry(chosen, rejected, center_rewards_coefficient=0.01).item() == pytest.approx(
        0.2014133 + 0.0625
    )


def test_equal_rewards_cost_ln_2_and_no_margin_is_a_margin_of_0() -> None:
    rewards = torch.randn(5, dtype=torch.float64)
    assert bradley_terry(rewards, rewards).tolist() == pytest.approx([math.log(2)] * 5, abs=1e-12)
    other, zeros = torch.randn(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    assert torch.equal(bradley_terry(rewards, other, margins=zeros), bradley_terry(rewards, other))


def test_only_the_centering_term_sees_a_constant() -> None:
    """The first term is blind to r + 100; the second one falls to nothing where r_w = -r_l."""
    chosen, rejected = torch.tensor([1.25, -0.5]), torch.tensor([-1.25, 0.5])
    plain = bradley_terry(chosen, rejected)
    assert torch.allclose(bradley_terry(chosen + 100, rejected + 100), plain)
    assert torch.equal(bradley_terry(chosen, rejected, center_rewards_coefficient=7.0), plain)
    assert bradley_terry(chosen + 1, rejected + 1, center_rewards_coefficient=1.0).tolist() == pytest.approx(
        (plain + 4).tolist()
    )


def test_gradient_in_closed_form() -> None:
    """dL/dr_w = -s(-(r_w - r_l - m)) + 2 c (r_w + r_l)."""
    chosen = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    rejected, margins = torch.tensor([1.0, 0.0, -1.0]).double(), torch.tensor([0.0, 1.0, 3.0]).double()
    bradley_terry(chosen, rejected, margins=margins, center_rewards_coefficient=0.1).sum().backward()
    expected = -torch.sigmoid(-(chosen - rejected - margins)) + 0.2 * (chosen + rejected)
    assert chosen.grad is not None and torch.allclose(chosen.grad, expected, atol=1e-12)


def test_all_pairs_by_hand() -> None:
    """r = 1, 0, 0 in the order of the scores: (2 ln(1 + e^-1) + ln 2) / 3; (K choose 2) = 3."""
    loss = all_pairs(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[2, 3, 1]]))
    assert loss.tolist() == [pytest.approx((2 * 0.3132617 + 0.6931472) / 3)]


def test_all_pairs_of_two_are_bradley_terry() -> None:
    rewards = torch.randn(6, 2, dtype=torch.float64)
    scores = torch.tensor([[1, 0]] * 6)
    for center_coefficient in (0.0, 0.01):
        pair_loss = bradley_terry(rewards[:, 0], rewards[:, 1], center_rewards_coefficient=center_coefficient)
        assert torch.equal(
            all_pairs(rewards, scores, center_rewards_coefficient=center_coefficient), pair_loss
        )


def test_all_pairs_at_once_are_the_mean_of_the_pairs_one_by_one() -> None:
    """With ties left out of sum and count, margins and centring; and the gradients are those of the mean."""
    rewards, scores = random_lists()
    rewards.requires_grad_()
    margins = torch.rand(4, 5, 5, dtype=torch.float64)
    at_once = all_pairs(rewards, scores, margins=margins, center_rewards_coefficient=0.02)
    for group in range(4):
        one_by_one = [
            bradley_terry(
                rewards[group, i],
                rewards[group, j],
                margins=margins[group, i, j],
                center_rewards_coefficient=0.02,
            )
            for i in range(5)
            for j in range(5)
            if scores[group, i] > scores[group, j]
        ]
        assert 0 < len(one_by_one) < 10, "the case has ties"
        mean = torch.stack(one_by_one).mean()
        assert at_once[group].item() == pytest.approx(mean.item(), abs=1e-12)
        (ours,) = torch.autograd.grad(at_once[group], rewards, retain_graph=True)
        (theirs,) = torch.autograd.grad(mean, rewards)
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_ties_have_no_loss_and_order_does_not_matter() -> None:
    rewards, scores = random_lists()
    rewards.requires_grad_()
    nothing = all_pairs(rewards, torch.ones_like(scores), center_rewards_coefficient=1.0)
    assert nothing.tolist() == [0.0] * 4
    assert not torch.autograd.grad(nothing.sum(), rewards)[0].any()
    order = [3, 0, 4, 1, 2]
    assert torch.allclose(
        all_pairs(rewards[:, order], scores[:, order]), all_pairs(rewards, scores), atol=1e-12
    )


def test_missing_completions_are_ignored() -> None:
    rewards, scores = random_lists()
    present = torch.tensor([[True, True, True, False, False]] * 4)
    filled = rewards.masked_fill(~present, float("nan"))
    expected = all_pairs(rewards[:, :3], scores[:, :3])
    assert torch.allclose(all_pairs(filled, scores, present=present), expected, atol=1e-12)


def test_gradcheck() -> None:
    rewards, scores = random_lists(2, 4)
    assert torch.autograd.gradcheck(
        lambda values: all_pairs(values, scores, center_rewards_coefficient=0.1), (rewards.requires_grad_(),)
    )


def test_rewards_of_ten_thousand() -> None:
    """ln(1 + e^20000) = 20000 with slope -1; on the other side 0."""
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry(chosen, -chosen.detach())
    loss.sum().backward()
    assert loss.tolist() == [20000.0, 0.0]
    assert chosen.grad is not None and chosen.grad.tolist() == [-1.0, 0.0]
    assert all_pairs(torch.tensor([[-1e4, 1e4]]), torch.tensor([[1, 0]])).tolist() == [20000.0]
