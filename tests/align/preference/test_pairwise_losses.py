"""Losses on pairs: numbers by hand, identities, gradients in closed form, extremes."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from preference_batches import at_margins, by_hand, random_pairs

from align.preference.losses import pairwise
from align.preference.losses.catalog import all_losses
from align.preference.losses.inputs import LossOutput, Pairs

PAIRWISE = [name for name, loss in all_losses().items() if loss.takes == "Pairs"]
BETA, FLIPS = 0.5, 0.1


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def call(name: str, pairs: Pairs, **settings: float | str) -> LossOutput:
    return all_losses()[name].function()(pairs, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("dpo", {"beta": 0.5}, 0.2014132780),  # log(1 + e^-1.5)
        ("cdpo", {"beta": 0.5, "label_smoothing": 0.1}, 0.3514132780),  # 0.9 x 0.20141 + 0.1 x 1.70141
        ("robust", {"beta": 0.5, "label_smoothing": 0.1}, 0.0139132780),  # (0.18127 - 0.17014) / 0.8
        ("ipo", {"beta": 0.5}, 4.0),  # (3 - 1)^2
        ("ipo", {"beta": 0.5, "length_normalized": True}, 0.1225),  # (2/5 + 1/4 - 1)^2 = (-0.35)^2
        ("hinge", {"beta": 0.5}, 0.0),  # 1 - 1.5 < 0
        ("hinge", {"beta": 0.1}, 0.7),  # 1 - 0.3
        ("slic", {"margin": 1.0, "nll_weight": 0.5}, 5.0),  # max(0, 1 + 10 - 14) + 0.5 x 10
        ("slic", {"margin": 6.0, "nll_weight": 0.5}, 7.0),  # 6 + 10 - 14 + 0.5 x 10
        ("simpo", {"beta": 2.0, "margin": 1.0}, 0.1269280110),  # 2 (-2 + 3.5) - 1 = 2: log(1 + e^-2)
        ("cpo", {"beta": 0.5, "nll_weight": 1.0}, 2.1269280110),  # 0.5 x 4 = 2: log(1 + e^-2), and 10 / 5
        ("apo_zero", {"beta": 0.5}, 0.6464820902),  # 1 - s(1) + s(-0.5) = 0.26894 + 0.37754
        ("apo_down", {"beta": 0.5}, 0.9134841024),  # s(1) + 1 - s(1.5) = 0.73106 + 0.18243
        ("rpo", {"beta": 0.5, "nll_weight": 1.0}, 2.2014132780),  # 0.20141 + 10 / 5
    ],
)
def test_numbers_by_hand(name: str, settings: dict[str, float | str], expected: float) -> None:
    """h_w = 2, h_l = -1, m = 3, per token -2 and -3.5; the arithmetic stands behind each line."""
    assert call(name, by_hand(), **settings).losses.tolist() == [pytest.approx(expected, abs=1e-9)]


def test_exo_by_hand() -> None:
    """q = s(1.5) = 0.8175745 against 0.9: q ln(q / 0.9) + (1 - q) ln((1 - q) / 0.1) = 0.0311388."""
    loss = pairwise.exo(by_hand(), beta=0.5, label_smoothing=0.1).losses.item()
    assert loss == pytest.approx(-0.0785303 + 0.1096691, abs=2e-7)
    q = sigmoid(1.5)
    assert loss == pytest.approx(q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1), abs=1e-12)


def test_orpo_by_hand() -> None:
    """p_w = e^-2, p_l = e^-3.5 by plain odds: 0.1565176 / 0.0311377 = 5.0266 to 1; -ln of that share of 1."""
    odds_w, odds_l = math.exp(-2) / (1 - math.exp(-2)), math.exp(-3.5) / (1 - math.exp(-3.5))
    assert (odds_w, odds_l) == (pytest.approx(0.1565176, abs=1e-6), pytest.approx(0.0311377, abs=1e-6))
    share = odds_w / (odds_w + odds_l)
    loss = pairwise.orpo(by_hand(), beta=0.25, nll_weight=1.0).losses.item()
    assert loss == pytest.approx(2 - 0.25 * math.log(share), abs=1e-12)


@pytest.mark.parametrize("name", [name for name in PAIRWISE if all_losses()[name].needs.reference])
def test_implicit_rewards_are_beta_times_the_ratios(name: str) -> None:
    """Beta 0.5, h_w = 2 and h_l = -1: rewards 1 and -0.5, whatever the loss, and no gradient."""
    pairs = by_hand()
    pairs.chosen_logps.requires_grad_()
    output = call(name, pairs, beta=0.5)
    assert output.chosen_rewards.tolist() == [1.0] and output.rejected_rewards.tolist() == [-0.5]
    assert output.losses.requires_grad and not output.chosen_rewards.requires_grad


@pytest.mark.parametrize(
    ("name", "expected"),
    [("simpo", (-4.0, -7.0)), ("cpo", (-1.0, -1.4)), ("orpo", (-0.2, -0.35)), ("slic", (-10.0, -14.0))],
)
def test_rewards_without_a_reference(name: str, expected: tuple[float, float]) -> None:
    """What the losses compare: 2 x -2 and 2 x -3.5; 0.1 x -10 and -14; 0.1 x -2 and -3.5; -10 and -14."""
    output = call(name, by_hand())
    assert (output.chosen_rewards.item(), output.rejected_rewards.item()) == pytest.approx(expected)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_where_policy_and_reference_are_one(beta: float) -> None:
    """m = 0: ln 2; 1 / (4 beta^2); 1; 1/2 + 1/2; and for e = 0.1 EXO's KL of (1/2, 1/2) from (0.9, 0.1)."""
    pairs = random_pairs()
    same = replace(
        pairs, reference_chosen_logps=pairs.chosen_logps, reference_rejected_logps=pairs.rejected_logps
    )
    expected = {name: math.log(2) for name in ("dpo", "cdpo", "robust")}
    expected |= {"ipo": 1 / (4 * beta**2), "hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0}
    for name, value in expected.items():
        assert call(name, same, beta=beta).losses.tolist() == pytest.approx([value] * 6, rel=1e-12), name
    divergence = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    exo = pairwise.exo(same, beta=beta, label_smoothing=0.1).losses
    assert exo.tolist() == pytest.approx([divergence] * 6, rel=1e-12)
    assert call("ipo", same, beta=beta, length_normalized=True).losses[0].item() == pytest.approx(
        1 / (4 * beta**2)
    )


def test_settings_at_zero_give_the_plain_loss() -> None:
    pairs = random_pairs()
    dpo = pairwise.dpo(pairs).losses
    for other in (
        pairwise.cdpo(pairs, label_smoothing=0.0),
        pairwise.robust(pairs, label_smoothing=0.0),
        pairwise.rpo(pairs, nll_weight=0.0),
    ):
        assert torch.equal(other.losses, dpo)
    without = replace(pairs, reference_chosen_logps=0 * pairs.chosen_logps, reference_rejected_logps=0 * dpo)
    assert torch.allclose(pairwise.cpo(pairs, nll_weight=0.0).losses, pairwise.dpo(without).losses)
    tokens = replace(without, chosen_logps=pairs.chosen_mean_logps, rejected_logps=pairs.rejected_mean_logps)
    assert torch.allclose(pairwise.simpo(pairs, margin=0.0).losses, pairwise.dpo(tokens, beta=2.0).losses)
    assert torch.allclose(
        pairwise.slic(pairs, margin=1.0, nll_weight=0.0).losses, pairwise.hinge(without, beta=1.0).losses
    )


def test_robust_is_without_bias_under_swapped_labels() -> None:
    """(1 - e) L(m) + e L(-m) = dpo(m): the reason of the loss (arXiv 2403.00409, lemma 3.1)."""
    pairs = random_pairs()
    swapped = Pairs(
        pairs.rejected_logps,
        pairs.chosen_logps,
        pairs.rejected_lengths,
        pairs.chosen_lengths,
        pairs.reference_rejected_logps,
        pairs.reference_chosen_logps,
    )
    mean = 0.7 * pairwise.robust(pairs, label_smoothing=0.3).losses
    mean = mean + 0.3 * pairwise.robust(swapped, label_smoothing=0.3).losses
    assert torch.allclose(mean, pairwise.dpo(pairs).losses, atol=1e-12)
    # And dpo(m) - dpo(-m) = -beta m.
    difference = pairwise.dpo(pairs).losses - pairwise.dpo(swapped).losses
    assert torch.allclose(difference, -0.1 * pairs.margins, atol=1e-12)


CLOSED: dict[str, Callable[[float], float]] = {
    "dpo": lambda m: -BETA * sigmoid(-BETA * m),
    "cdpo": lambda m: -BETA * (sigmoid(-BETA * m) - FLIPS),
    "robust": lambda m: (
        -BETA * ((1 - FLIPS) * sigmoid(-BETA * m) + FLIPS * sigmoid(BETA * m)) / (1 - 2 * FLIPS)
    ),
    "ipo": lambda m: 2 * (m - 1 / (2 * BETA)),
    "hinge": lambda m: -BETA if BETA * m < 1 else 0.0,
    "exo": lambda m: (
        BETA * sigmoid(BETA * m) * sigmoid(-BETA * m) * (BETA * m - math.log((1 - FLIPS) / FLIPS))
    ),
    "apo_zero": lambda m: -BETA * sigmoid(BETA * m) * sigmoid(-BETA * m),
    "apo_down": lambda m: 0.0,
    "simpo": lambda m: -BETA * sigmoid(-(BETA * m - 1)),
    "slic": lambda m: -1 - 0.5 if m < 1 else -0.5,
    "cpo": lambda m: -BETA * sigmoid(-BETA * m) - 1,
    "rpo": lambda m: -BETA * sigmoid(-BETA * m) - 1,
}
"""dL/dm where the chosen completion has one token, h_w = m and h_l = 0; likelihoods weigh their defaults."""


@pytest.mark.parametrize("name", CLOSED)
def test_gradient_in_closed_form(name: str) -> None:
    """Each derivative was taken by hand; the others' terms: slic w = 1/2, cpo and rpo w = 1, simpo g = 1."""
    margins = [-30.0, -3.0, -0.5, 0.0, 0.25, 1.5, 7.0, 40.0]
    settings = {"beta": BETA, "label_smoothing": FLIPS}
    known = {key: value for key, value in settings.items() if key in all_losses()[name].defaults}
    pairs = at_margins(margins)
    call(name, pairs, **known).losses.sum().backward()
    assert pairs.chosen_logps.grad is not None
    assert pairs.chosen_logps.grad.tolist() == pytest.approx([CLOSED[name](m) for m in margins], abs=1e-12)


def test_apo_lowers_the_rejected_completion() -> None:
    """dL/dh_l = beta s(h) s(-h), h = beta h_l for APO-zero and beta m for APO-down; h_w = 0.5 here."""
    rejected = torch.tensor([-4.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    zeros, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.long)
    pairs = Pairs(zeros + 0.5, rejected, ones, ones, zeros, zeros)
    for loss, at in ((pairwise.apo_zero, rejected), (pairwise.apo_down, 0.5 - rejected)):
        (slope,) = torch.autograd.grad(loss(pairs, beta=BETA).losses.sum(), rejected)
        h = (BETA * at).tolist()
        assert slope.tolist() == pytest.approx([BETA * sigmoid(x) * sigmoid(-x) for x in h], abs=1e-12)


def test_orpo_gradient_in_closed_form() -> None:
    """With x = log p_w per token: dL/dx = -1 - beta s(-log ratio) / (1 - p_w), by the chain rule."""
    x = torch.tensor([-0.01, -0.3, -2.0, -9.0], dtype=torch.float64, requires_grad=True)
    ones, rejected = torch.ones(4, dtype=torch.long), torch.full((4,), -1.5, dtype=torch.float64)
    pairwise.orpo(Pairs(x, rejected, ones, ones), beta=BETA).losses.sum().backward()
    p, other = x.detach().exp(), math.exp(-1.5)
    ratio = torch.log(p / (1 - p) / (other / (1 - other)))
    assert x.grad is not None
    assert torch.allclose(x.grad, -1 - BETA * torch.sigmoid(-ratio) / (1 - p), atol=1e-12)


def test_orpo_s_odds_are_exact_near_certainty() -> None:
    """At log p = -1e-5 float32 has 1 - exp(x) to two digits; by expm1 the loss has float64's six."""
    x = torch.tensor([-1e-5, -2e-6, -0.3, -0.7])
    values = []
    for dtype in (torch.float32, torch.float64):
        chosen, ones = x.to(dtype), torch.ones(4, dtype=torch.long)
        pairs = Pairs(chosen, torch.full_like(chosen, -1e-4), ones, ones)
        values.append(pairwise.orpo(pairs, beta=1.0, nll_weight=0.0).losses)
    assert values[0].tolist() == pytest.approx(values[1].tolist(), rel=2e-5)


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradcheck(name: str) -> None:
    pairs = random_pairs(seed=3)
    leaves = (pairs.chosen_logps.requires_grad_(), pairs.rejected_logps.requires_grad_())

    def values(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return call(name, replace(pairs, chosen_logps=chosen, rejected_logps=rejected)).losses

    assert torch.autograd.gradcheck(values, leaves)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_probabilities_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Chosen or rejected at 0 (probability 1) and at -10,000 nats: losses and gradients are numbers."""
    chosen = torch.tensor([0.0, -1e4, 0.0, -1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 0.0, 0.0, -1e4], dtype=dtype, requires_grad=True)
    ones, reference = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=dtype)
    output = call(name, Pairs(chosen, rejected, ones, ones, reference, reference))
    output.losses.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert all(values.isfinite().all() for values in (output.losses, chosen.grad, rejected.grad))


def test_margins_of_ten_thousand() -> None:
    """Beta m = +-1000: log(1 + e^1000) is 1000 and its slope -beta; on the other side both are 0."""
    pairs = at_margins([-1e4, 1e4], torch.float32)
    losses_at = pairwise.dpo(pairs).losses
    losses_at.sum().backward()
    assert losses_at.tolist() == [pytest.approx(1000), 0.0]
    assert pairs.chosen_logps.grad is not None
    assert pairs.chosen_logps.grad.tolist() == [pytest.approx(-0.1), 0.0]
    assert pairwise.hinge(pairs).losses.tolist() == [1001.0, 0.0]
    assert pairwise.cdpo(pairs).losses.tolist() == pytest.approx([900.0, 100.0])
    # (-0.1 x 1000) / 0.8: robust DPO goes below 0.
    assert pairwise.robust(pairs).losses.tolist() == pytest.approx([1125.0, -125.0])
    # Where q is 0 or 1: -ln e, and -ln(1 - e).
    assert pairwise.exo(pairs).losses.tolist() == pytest.approx([-math.log(1e-3), 0.0010005], abs=1e-6)


def test_minima() -> None:
    """Conservative DPO and EXO rest where s(beta m) = 1 - e, IPO where m = 1 / (2 beta): slope 0 there."""
    at = math.log(0.9 / 0.1) / BETA
    for name, margin in (("cdpo", at), ("exo", at), ("ipo", 1 / (2 * BETA))):
        settings = {"beta": BETA} | ({} if name == "ipo" else {"label_smoothing": 0.1})
        pairs = at_margins([margin - 0.1, margin, margin + 0.1])
        call(name, pairs, **settings).losses.sum().backward()
        assert pairs.chosen_logps.grad is not None
        left, middle, right = pairs.chosen_logps.grad.tolist()
        assert left < 0 < right and middle == pytest.approx(0, abs=1e-12), name


@pytest.mark.parametrize("name", PAIRWISE)
def test_each_pair_has_its_own_loss(name: str) -> None:
    """Another order of the pairs gives the losses in that order, and one pair alone gives its own."""
    pairs, order = random_pairs(seed=1), torch.tensor([4, 0, 5, 2, 1, 3])
    fields = [getattr(pairs, field) for field in Pairs.__slots__]
    losses_in_order = call(name, pairs).losses
    assert losses_in_order.shape == (6,)
    moved = Pairs(*[field[order] for field in fields])
    assert torch.equal(call(name, moved).losses, losses_in_order[order])
    alone = Pairs(*[field[2:3] for field in fields])
    assert torch.equal(call(name, alone).losses, losses_in_order[2:3])


def test_shapes_that_would_broadcast_are_refused() -> None:
    column_vector, row = torch.zeros(3, 1), torch.zeros(3)
    with pytest.raises(ValueError, match=r"one shape with 1 dimensions, found \[\(3,\), \(3, 1\)"):
        Pairs(row, column_vector, row, row)
    with pytest.raises(ValueError, match="one shape with 1 dimensions"):
        Pairs(row, row, row, row, torch.zeros(2), torch.zeros(2))
