"""Whitening, token rewards, GAE and KL controllers: by hand and by definition."""

import doctest
import json
from dataclasses import asdict
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.rl.maths import advantages as advantages_module
from align.rl.maths import kl as kl_module
from align.rl.maths import losses, masked
from align.rl.maths.advantages import gae, token_rewards
from align.rl.maths.kl import AdaptiveKLController, FixedKLController, kl_terms
from align.rl.maths.masked import masked_mean, masked_var, whiten

DOUBLE = torch.float64
LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)
FRACTION = st.sampled_from([0.0, 0.3, 0.95, 1.0])


def random_completions(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards, values and mask of completions, with NaN after every end."""
    generator = torch.Generator().manual_seed(seed)
    mask_CT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rewards_CT, values_CT = torch.randn(2, *mask_CT.shape, generator=generator, dtype=DOUBLE)
    return rewards_CT.masked_fill(~mask_CT, torch.nan), values_CT.masked_fill(~mask_CT, torch.nan), mask_CT


def gae_by_definition(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> list[float]:
    """Return sum_l (gamma lambda)^l delta_{t+l} of one completion, each from its own sum."""
    following = [*values[1:], 0.0]
    deltas = [
        reward + gamma * later - value
        for reward, later, value in zip(rewards, following, values, strict=True)
    ]
    return [
        sum((gamma * gae_lambda) ** step * delta for step, delta in enumerate(deltas[start:]))
        for start in range(len(deltas))
    ]


@pytest.mark.parametrize(
    ("module", "examples"),
    [(masked, 7), (advantages_module, 16), (kl_module, 4), (losses, 12)],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_doctests(module: ModuleType, examples: int) -> None:
    assert doctest.testmod(module) == (0, examples)


@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(deadline=None)
def test_masked_statistics_equal_torch(lengths: list[int], seed: int) -> None:
    values, _, mask = random_completions(lengths, seed)
    picked = values[mask]
    assert masked_mean(values, mask).item() == pytest.approx(picked.mean().item(), abs=1e-12)
    population = picked.var(correction=0).item()
    assert masked_var(values, mask, unbiased=False).item() == pytest.approx(population, abs=1e-12)
    if len(picked) > 1:
        assert masked_var(values, mask).item() == pytest.approx(picked.var().item(), abs=1e-12)


def test_single_entry_has_variance_0() -> None:
    values, mask = torch.tensor([[5.0, torch.nan]]), torch.tensor([[True, False]])
    assert masked_var(values, mask).item() == 0 and masked_var(values, mask, unbiased=False).item() == 0
    assert whiten(values, mask, shift_mean=True).tolist() == [[0.0, 0.0]]
    assert whiten(values, mask, shift_mean=False).tolist() == [[5.0, 0.0]]


@given(lengths=LENGTHS.filter(lambda lengths: sum(lengths) > 3), seed=st.integers(0, 99))
@settings(deadline=None)
def test_whitened_values_have_variance_1(lengths: list[int], seed: int) -> None:
    values, _, mask = random_completions(lengths, seed)
    shifted, unshifted = (whiten(values, mask, shift_mean=shift) for shift in (True, False))
    assert shifted[mask].var().item() == pytest.approx(1, rel=1e-4)
    assert shifted[mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert unshifted[mask].mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-9)
    assert (shifted[~mask] == 0).all() and (unshifted[~mask] == 0).all()


def test_masked_entries_get_no_gradient() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.nan, torch.inf]], requires_grad=True)
    (whiten(values, mask, shift_mean=True) ** 3).sum().backward()
    assert values.grad is not None and (values.grad[~mask] == 0).all() and (values.grad[mask] != 0).all()


@given(lengths=LENGTHS, seed=st.integers(0, 99), beta=st.floats(0, 2))
@settings(deadline=None)
def test_token_rewards_sum_to_score_minus_kl(lengths: list[int], seed: int, beta: float) -> None:
    kl, _, mask = random_completions(lengths, seed)
    scores = torch.arange(1.0, len(lengths) + 1, dtype=DOUBLE)
    rewards = token_rewards(kl, scores, torch.tensor(lengths), kl_coef=beta)
    expected = scores - beta * kl.masked_fill(~mask, 0.0).sum(1)
    assert rewards.sum(1).tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert (rewards[~mask] == 0).all()
    inner = mask & (torch.arange(mask.shape[1]) < torch.tensor(lengths)[:, None] - 1)
    assert torch.equal(rewards[inner], -beta * kl[inner])


@given(lengths=LENGTHS, seed=st.integers(0, 99), discount=FRACTION, trace=FRACTION)
@settings(deadline=None)
def test_gae_equals_its_definition(lengths: list[int], seed: int, discount: float, trace: float) -> None:
    rewards, values, mask = random_completions(lengths, seed)
    advantages_CT, returns = gae(rewards, values, mask, gamma=discount, gae_lambda=trace)
    for row, length in enumerate(lengths):
        row_rewards, row_values = rewards[row, :length].tolist(), values[row, :length].tolist()
        expected = gae_by_definition(row_rewards, row_values, discount, trace)
        assert advantages_CT[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(returns[mask], advantages_CT[mask] + values[mask])
    assert (advantages_CT[~mask] == 0).all() and (returns[~mask] == 0).all()


@given(lengths=LENGTHS, seed=st.integers(0, 99), discount=FRACTION)
@settings(deadline=None)
def test_lambda_1_gives_discounted_returns(lengths: list[int], seed: int, discount: float) -> None:
    """Sum_l gamma^l delta_{t+l} telescopes: what remains is sum_l gamma^l r_{t+l} - V_t."""
    rewards, values, mask = random_completions(lengths, seed)
    _, returns = gae(rewards, values, mask, gamma=discount, gae_lambda=1.0)
    for row, length in enumerate(lengths):
        row_rewards = rewards[row, :length].tolist()
        expected = [
            sum(discount**step * reward for step, reward in enumerate(row_rewards[start:]))
            for start in range(length)
        ]
        assert returns[row, :length].tolist() == pytest.approx(expected, abs=1e-12)


def test_lambda_0_gives_td_errors() -> None:
    """Gamma 1/2: 1 + 8/2 - 4 = 1, 2 + 6/2 - 8 = -3, 5 - 6 = -1."""
    rewards, values = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[4.0, 8.0, 6.0]])
    advantages_CT, _ = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, gae_lambda=0.0)
    assert advantages_CT.tolist() == [[1.0, -3.0, -1.0]]


def test_exact_values_give_advantage_0() -> None:
    """Rewards 1, 2, 3 and gamma 1: values 6, 5, 3 are the returns for any lambda."""
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[6.0, 5.0, 3.0]])
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages_CT, returns = gae(rewards, values, torch.ones(1, 3) > 0, gamma=1.0, gae_lambda=gae_lambda)
        assert advantages_CT.tolist() == [[0.0, 0.0, 0.0]] and torch.equal(returns, values)


@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(deadline=None)
def test_advantages_are_independent_of_the_batch(lengths: list[int], seed: int) -> None:
    rewards, values, mask = random_completions(lengths, seed)
    batched, _ = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8)
    for row, length in enumerate(lengths):
        selection = (slice(row, row + 1), slice(0, length))
        alone, _ = gae(rewards[selection], values[selection], mask[selection], gamma=0.9, gae_lambda=0.8)
        assert torch.equal(alone[0], batched[row, :length])


def test_targets_carry_no_gradient() -> None:
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    targets = gae(values * 2, values, mask, gamma=1.0, gae_lambda=0.95)
    assert not any(target.requires_grad for target in targets)
    assert not token_rewards(values, values[:, 0], torch.tensor([2]), kl_coef=0.1).requires_grad


def test_kl_terms_by_hand_and_by_their_mean() -> None:
    """Policy (3/4, 1/4) against (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2; k1 and k3 meet it, k2 does not."""
    logps = torch.tensor([0.75, 0.25], dtype=DOUBLE).log()
    reference = torch.tensor([0.5, 0.5], dtype=DOUBLE).log()
    exact = (
        0.75 * torch.tensor(1.5, dtype=DOUBLE).log() + 0.25 * torch.tensor(0.5, dtype=DOUBLE).log()
    ).item()
    means = {
        name: (logps.exp() * kl_terms(logps, reference, estimator=name)).sum().item()
        for name in ("k1", "k2", "k3")
    }
    assert means["k1"] == pytest.approx(exact, abs=1e-12) and means["k3"] == pytest.approx(exact, abs=1e-12)
    assert means["k2"] != pytest.approx(exact, rel=0.01) and means["k2"] == pytest.approx(exact, rel=0.5)


def test_adaptive_kl_controller_by_hand() -> None:
    """Target 4, n / horizon 1/2: KL 4.4 is 0.1 above, 3.6 is 0.1 below, 40 and 0 count as 0.2."""
    controller = AdaptiveKLController(kl_coef=1.0, target=4.0, horizon=128)
    coefficients = [controller.updated(kl, 64).kl_coef for kl in (4.4, 3.6, 40.0, 0.0, 4.0)]
    assert coefficients == pytest.approx([1.05, 0.95, 1.1, 0.9, 1.0], abs=1e-12)
    assert controller.kl_coef == 1.0, "a new controller is returned"
    assert controller.updated(4.4, 64).updated(3.6, 64).kl_coef == pytest.approx(1.05 * 0.95, abs=1e-12)


def test_kl_controllers_survive_json_and_reject_nan() -> None:
    controller = AdaptiveKLController(kl_coef=0.1, target=6.0, horizon=10_000).updated(7.3, 37)
    assert AdaptiveKLController(**json.loads(json.dumps(asdict(controller)))) == controller
    assert FixedKLController(0.3).updated(float("nan"), 8) == FixedKLController(0.3)
    with pytest.raises(AssertionError, match="KL is nan"):
        controller.updated(float("nan"), 8)
    with pytest.raises(AssertionError, match="below 0"):
        controller.updated(1.0, 50_000)
