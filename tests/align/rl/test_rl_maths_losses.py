"""PPO losses by hand, their gradients against closed forms in float64, and masking."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.rl.maths.losses import entropy, explained_variance, policy_loss, value_loss
from align.rl.maths.masked import masked_mean

DOUBLE = torch.float64
GARBAGE = (torch.nan, torch.inf, -torch.inf, 1e4)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def leaf(*values: float) -> Tensor:
    return torch.tensor([values], dtype=DOUBLE, requires_grad=True)


def gradient(losses: Tensor, of: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(losses.sum(), of)
    return grad


def test_policy_loss_by_hand() -> None:
    """Clip 0.2, advantages 2 and -2 at the ratios 1.5, 0.5, 1.1: max(-A r, -A clipped r)."""
    logps = torch.tensor([[1.5, 0.5, 1.1]] * 2, dtype=DOUBLE).log()
    advantages = torch.tensor([[2.0], [-2.0]], dtype=DOUBLE).expand(2, 3)
    loss = policy_loss(logps, torch.zeros_like(logps), advantages, ones(2, 3), clip_range=0.2)
    assert loss.losses.flatten().tolist() == pytest.approx([-2.4, -1.0, -2.2, 3.0, 1.6, 2.2], abs=1e-12)
    assert loss.clipped.tolist() == [[True, False, False], [False, True, False]]
    assert loss.ratios[0].tolist() == pytest.approx([1.5, 0.5, 1.1], abs=1e-12)


def test_gradient_at_ratio_1_is_the_policy_gradient() -> None:
    """Ratio 1: d/dlogits of -A r is -A (onehot - softmax), token by token, to the last bit of float64."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=DOUBLE, requires_grad=True)
    tokens, advantages = torch.randint(5, (2, 3)), torch.randn(2, 3, dtype=DOUBLE)
    logps = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    loss = policy_loss(logps, logps.detach(), advantages, ones(2, 3), clip_range=0.2)
    assert (loss.ratios == 1).all() and not loss.clipped.any()
    assert torch.equal(loss.losses.detach(), -advantages)
    picked = torch.nn.functional.one_hot(tokens, 5) - logits.detach().softmax(-1)
    torch.testing.assert_close(
        gradient(loss.losses, logits), -advantages[..., None] * picked, atol=1e-14, rtol=0
    )


@given(
    ratio=st.floats(0.05, 4), gain=st.floats(-3, 3).filter(lambda gain: gain != 0), clip=st.floats(0.05, 0.5)
)
@settings(deadline=None)
def test_policy_gradient_is_minus_a_r_or_0_if_clipped(ratio: float, gain: float, clip: float) -> None:
    logps = leaf(math.log(ratio))
    loss = policy_loss(
        logps, torch.zeros_like(logps), torch.tensor([[gain]], dtype=DOUBLE), ones(1, 1), clip_range=clip
    )
    exact = loss.ratios.item()
    is_clipped = exact > 1 + clip if gain > 0 else exact < 1 - clip
    assert loss.clipped.item() == is_clipped
    expected = 0.0 if is_clipped else -gain * exact
    assert gradient(loss.losses, logps).item() == pytest.approx(expected, abs=1e-12)
    assert loss.losses.item() >= -gain * exact - 1e-12, "the larger of the two losses"


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_tokens_add_0_to_loss_and_gradient(garbage: float) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.manual_seed(1)
    tensors = torch.randn(3, 2, 3, dtype=DOUBLE)
    clean = [tensor.masked_fill(~mask, 0.0).requires_grad_() for tensor in tensors]
    dirty = [tensor.masked_fill(~mask, garbage).requires_grad_() for tensor in tensors]
    for loss in (policy_loss, value_loss):
        results = [loss(*inputs, mask, clip_range=0.2) for inputs in (clean, dirty)]
        assert torch.equal(results[0].losses, results[1].losses)
        assert torch.equal(results[0].clipped, results[1].clipped)
        assert (results[1].losses[~mask] == 0).all() and not results[1].clipped[~mask].any()
        gradients = [
            gradient(masked_mean(result.losses, mask), inputs[0])
            for result, inputs in zip(results, (clean, dirty), strict=True)
        ]
        assert torch.equal(*gradients) and (gradients[1][~mask] == 0).all()
        assert (gradients[1][mask] != 0).any()
    assert (policy_loss(*dirty, mask, clip_range=0.2).ratios[~mask] == 1).all()


def test_value_loss_by_hand() -> None:
    """Old 1, return 2, clip 1/2. V 1.25: both 0.75^2. V 2: held at 1.5, 1/4. V 0: 1.5^2, but 4 is more."""
    values, old = leaf(1.25, 2.0, 0.0), torch.ones(1, 3, dtype=DOUBLE)
    clipped_loss = value_loss(values, old, old * 2, ones(1, 3), clip_range=0.5)
    assert clipped_loss.losses.tolist() == [[0.28125, 0.125, 2.0]]
    assert clipped_loss.clipped.tolist() == [[False, True, False]]
    assert gradient(clipped_loss.losses, values).tolist() == [[-0.75, 0.0, -2.0]]
    unclipped = value_loss(values, old, old * 2, ones(1, 3), clip_range=None)
    assert unclipped.losses.tolist() == [[0.28125, 0.0, 2.0]] and not unclipped.clipped.any()


@given(value=st.floats(-2, 2), old=st.floats(-2, 2), target=st.floats(-2, 2))
@settings(deadline=None)
def test_value_gradient_is_the_error_or_0_if_clipped(value: float, old: float, target: float) -> None:
    values = leaf(value)
    before, goal = (torch.tensor([[number]], dtype=DOUBLE) for number in (old, target))
    clipped_loss = value_loss(values, before, goal, ones(1, 1), clip_range=0.2)
    expected = 0.0 if clipped_loss.clipped.item() else value - target
    assert gradient(clipped_loss.losses, values).item() == pytest.approx(expected, abs=1e-12)
    assert not clipped_loss.clipped.item() or abs(value - old) > 0.2
    unclipped = value_loss(values, before, goal, ones(1, 1), clip_range=None).losses
    assert clipped_loss.losses.item() >= unclipped.item()
    assert gradient(unclipped, values).item() == pytest.approx(value - target, abs=1e-12)


def test_entropy_by_hand() -> None:
    """Of 1/2, 1/4, 1/4: 1.5 ln 2; of V equal ones ln V; a token that cannot come counts 0."""
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.0], [7.0, 7.0, 7.0, 7.0]]).log()
    assert entropy(logits).tolist() == pytest.approx([1.5 * math.log(2), math.log(4)], abs=1e-6)


def test_entropy_gradient_equals_closed_form() -> None:
    """dH/dz_v = -p_v (log p_v + H), and 0 for a token whose logit is -inf."""
    torch.manual_seed(2)
    logits = torch.randn(3, 6)
    logits[1, 2] = -torch.inf
    logits.requires_grad_()
    entropies = entropy(logits)
    probs = logits.detach().softmax(-1)
    logps = probs.log().masked_fill(probs == 0, 0.0)
    expected = -probs * (logps + entropies.detach()[:, None])
    torch.testing.assert_close(gradient(entropies, logits), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_entropy_equals_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    logits = torch.randn(7, 11).to(dtype).requires_grad_()
    unchunked, chunked = entropy(logits), entropy(logits, max_elements=25)
    assert unchunked.dtype == torch.float32 and torch.equal(unchunked, chunked)
    assert torch.equal(gradient(unchunked, logits), gradient(chunked, logits))


def test_explained_variance_by_hand() -> None:
    """Returns 1, 3 (variance 2): foretold 1; a constant 0; turned round, errors of -2 and 2: 1 - 8 / 2."""
    returns, mask = torch.tensor([[1.0, 3.0, torch.nan]]), torch.tensor([[True, True, False]])
    predictions = ([1.0, 3.0, 0.0], [5.0, 5.0, 0.0], [3.0, 1.0, 0.0], [11.0, 13.0, 0.0])
    explained = [explained_variance(torch.tensor([values]), returns, mask).item() for values in predictions]
    assert explained == [1.0, 0.0, -3.0, 1.0], "a constant error explains all the variance"
    constant = torch.ones(1, 3)
    assert math.isnan(explained_variance(constant, constant, mask).item())
