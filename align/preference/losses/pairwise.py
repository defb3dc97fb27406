r"""Losses on pairs of completions, one pure function each: raise the chosen one over the rejected one.

In the equations: y_w chosen, y_l rejected; pi policy, ref reference; h(y) = log pi(y|x) - log ref(y|x), over
all tokens; m = h(y_w) - h(y_l); s the logistic function. Log-probabilities are float32 or float64: in half
precision their differences are noise. A new loss is a new function here (see `inputs.py`).
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from align.preference.losses.inputs import (
    FlipRate,
    LossOutput,
    Needs,
    NonNegativeSetting,
    Pairs,
    PositiveFlipRate,
    PositiveSetting,
    Switch,
)


def dpo(pairs: Annotated[Pairs, Needs(reference=True)], *, beta: PositiveSetting = 0.1) -> LossOutput:
    """Direct preference optimization: logistic loss on the margin. Beta as in the paper, appendix B.

    -log s(beta m); arXiv 2305.18290, equation 7.
    """
    return _with_implicit_rewards(pairs, -F.logsigmoid(beta * pairs.margins), beta)


def cdpo(
    pairs: Annotated[Pairs, Needs(reference=True)],
    *,
    beta: PositiveSetting = 0.1,
    label_smoothing: FlipRate = 0.1,
) -> LossOutput:
    """Conservative DPO: a fraction e of the labels is assumed wrong, so that the margin stops growing.

    -(1 - e) log s(beta m) - e log s(-beta m); E. Mitchell, "A note on DPO with noisy preferences" (2023),
    equation 3, and the DPO authors' code. At its minimum s(beta m) = 1 - e. 0.1: see the robust loss.
    """
    logits = beta * pairs.margins
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return _with_implicit_rewards(pairs, losses, beta)


def robust(
    pairs: Annotated[Pairs, Needs(reference=True)],
    *,
    beta: PositiveSetting = 0.1,
    label_smoothing: FlipRate = 0.1,
) -> LossOutput:
    """Robust DPO: unbiased if labels are swapped at random with a known rate e.

    (-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2e); arXiv 2403.00409, section 3.1; e = 0.1 there in
    section 6. It is not bounded below: beyond some margin it decreases linearly.
    """
    logits = beta * pairs.margins
    clean, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    losses = ((1 - label_smoothing) * clean - label_smoothing * swapped) / (1 - 2 * label_smoothing)
    return _with_implicit_rewards(pairs, losses, beta)


def ipo(
    pairs: Annotated[Pairs, Needs(reference=True, over_tokens="setting")],
    *,
    beta: PositiveSetting = 0.1,
    length_normalized: Switch = False,
) -> LossOutput:
    """Identity preference optimization: regresses the margin to 1 / (2 beta).

    (m - 1 / (2 beta))^2; arXiv 2310.12036, equation 17, with beta for its tau (0.1 as in DPO: the paper ran
    no language model).

    Args:
        pairs: the pairs.
        beta: 1 / (2 beta) is the target margin, in nats.
        length_normalized: ``false`` is the equation as printed, and the DPO authors' code: with the default
            beta the target is 5 nats per completion. ``true`` takes h per token, as TRL does (which reports
            that IPO's authors agree): 5 nats per token with that beta, so use a larger one. The default is
            ``false``, the printed equation: beta then has about the same meaning as in DPO.
    """
    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    if length_normalized:
        chosen = chosen / pairs.chosen_lengths.clamp(min=1)
        rejected = rejected / pairs.rejected_lengths.clamp(min=1)
    return _with_implicit_rewards(pairs, (chosen - rejected - 1 / (2 * beta)) ** 2, beta)


def hinge(pairs: Annotated[Pairs, Needs(reference=True)], *, beta: PositiveSetting = 0.1) -> LossOutput:
    """RSO's normalized hinge: SLiC's hinge loss on the margin relative to the reference. Beta as in DPO.

    max(0, 1 - beta m); arXiv 2309.06657, hinge-norm, with beta for its gamma.
    """
    return _with_implicit_rewards(pairs, F.relu(1 - beta * pairs.margins), beta)


def slic(
    pairs: Annotated[Pairs, Needs(nll=True)],
    *,
    margin: NonNegativeSetting = 1.0,
    nll_weight: NonNegativeSetting = 0.5,
) -> LossOutput:
    """SLiC-HF: hinge loss on log-probabilities, plus an NLL term on the chosen completion.

    max(0, d - log pi(y_w) + log pi(y_l)) - w log pi(y_w); arXiv 2305.10425, section 2, where the last term
    is the SFT target's, for which we have y_w. d = 1 as in RSO's hinge; w = 1/2 is ours, so that the ranking
    term dominates.
    """
    losses = F.relu(margin - pairs.chosen_logps + pairs.rejected_logps) - nll_weight * pairs.chosen_logps
    return _loss_output(losses, pairs.chosen_logps, pairs.rejected_logps)


def simpo(
    pairs: Annotated[Pairs, Needs(over_tokens="mean")],
    *,
    beta: PositiveSetting = 2.0,
    margin: NonNegativeSetting = 1.0,
) -> LossOutput:
    """SimPO: logistic loss on log-probabilities per token, with a margin; no reference.

    -log s(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - g); arXiv 2405.14734, equation 6. The paper's
    beta is 2.0 to 2.5, its g 0.3 to 1.6; ``margin`` is g itself, by default g / beta = 0.5. In the authors'
    code the setting is g / beta.
    """
    chosen, rejected = beta * pairs.chosen_mean_logps, beta * pairs.rejected_mean_logps
    return _loss_output(-F.logsigmoid(chosen - rejected - margin), chosen, rejected)


def cpo(
    pairs: Annotated[Pairs, Needs(nll=True)],
    *,
    beta: PositiveSetting = 0.1,
    nll_weight: NonNegativeSetting = 1.0,
) -> LossOutput:
    """CPO: DPO with a uniform reference, plus an NLL term on the chosen completion.

    -log s(beta (log pi(y_w) - log pi(y_l))) - w log pi(y_w) / |y_w|; arXiv 2401.08417, equation 3 and its
    behavior cloning term, which the paper writes as a sum; TRL, from the authors' code, takes it per token,
    as we do. Beta = 0.1 and w = 1 are that code's.
    """
    chosen, rejected = beta * pairs.chosen_logps, beta * pairs.rejected_logps
    return _loss_output(
        -F.logsigmoid(chosen - rejected) - nll_weight * pairs.chosen_mean_logps, chosen, rejected
    )


def orpo(
    pairs: Annotated[Pairs, Needs(over_tokens="mean", nll=True)],
    *,
    beta: PositiveSetting = 0.1,
    nll_weight: NonNegativeSetting = 1.0,
) -> LossOutput:
    """ORPO: SFT on the chosen completion, plus an odds ratio term against the rejected one.

    -w log p_w - beta log s(log odds(p_w) - log odds(p_l)), odds(p) = p / (1 - p), with p the geometric mean
    of the tokens' probabilities; arXiv 2403.07691, equations 6 and 7; beta is its lambda, 0.1 its value for
    Mistral. The NLL is that of the completion only; the authors' code (by default) and TRL include the
    prompt's tokens.
    """
    chosen, rejected = pairs.chosen_mean_logps, pairs.rejected_mean_logps
    # log odds(p) = log p - log(1 - p), from log p alone.
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    losses = -nll_weight * chosen - beta * F.logsigmoid(log_odds)
    return _loss_output(losses, beta * chosen, beta * rejected)


def apo_zero(pairs: Annotated[Pairs, Needs(reference=True)], *, beta: PositiveSetting = 0.1) -> LossOutput:
    """APO-zero: raises chosen and lowers rejected; for chosen completions better than the model's.

    1 - s(beta h(y_w)) + s(beta h(y_l)); arXiv 2408.06266, equation 7; beta in section 5.2.
    """
    # 1 - s(x) as s(-x), which does not cancel.
    losses = torch.sigmoid(-beta * pairs.chosen_logratios) + torch.sigmoid(beta * pairs.rejected_logratios)
    return _with_implicit_rewards(pairs, losses, beta)


def apo_down(pairs: Annotated[Pairs, Needs(reference=True)], *, beta: PositiveSetting = 0.1) -> LossOutput:
    """APO-down: lowers both, rejected more; for chosen completions worse than the model's.

    s(beta h(y_w)) + 1 - s(beta m); arXiv 2408.06266, equation 8; beta in section 5.2.
    """
    losses = torch.sigmoid(beta * pairs.chosen_logratios) + torch.sigmoid(-beta * pairs.margins)
    return _with_implicit_rewards(pairs, losses, beta)


def exo(
    pairs: Annotated[Pairs, Needs(reference=True)],
    *,
    beta: PositiveSetting = 0.1,
    label_smoothing: PositiveFlipRate = 1e-3,
) -> LossOutput:
    """EXO on pairs: the reverse KL divergence instead of the forward one of conservative DPO.

    q log(q / (1 - e)) + (1 - q) log((1 - q) / e), q = s(beta m); arXiv 2402.00856, equation 16; beta:
    appendix B; e must be above 0 (1e-3: TRL's). For margins far on either side the gradient vanishes.
    """
    logits = beta * pairs.margins
    # 1 - q is sigmoid(-logits): a subtraction would cancel for large margins.
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return _with_implicit_rewards(pairs, chosen + rejected, beta)


def rpo(
    pairs: Annotated[Pairs, Needs(reference=True, nll=True)],
    *,
    beta: PositiveSetting = 0.1,
    nll_weight: NonNegativeSetting = 1.0,
) -> LossOutput:
    """RPO: DPO plus an NLL term that keeps the chosen log-probability from falling.

    -log s(beta m) - w log pi(y_w) / |y_w|; arXiv 2404.19733 (iterative reasoning preference optimization),
    equation 1, where the weight, 1, is on the other term; beta = 0.1 there.
    """
    return _with_implicit_rewards(
        pairs, -F.logsigmoid(beta * pairs.margins) - nll_weight * pairs.chosen_mean_logps, beta
    )


def _with_implicit_rewards(pairs: Pairs, losses: Tensor, beta: float) -> LossOutput:
    """Add DPO's implicit rewards, beta h(y) (arXiv 2305.18290, equation 5 without the prompt's term)."""
    return _loss_output(losses, beta * pairs.chosen_logratios, beta * pairs.rejected_logratios)


def _loss_output(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> LossOutput:
    # Rewards are metrics: they must not keep the graph alive, nor pass on a gradient.
    return LossOutput(losses, chosen_rewards.detach(), rejected_rewards.detach())


def _log1mexp(log_probability: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0 without cancellation; x is clamped below 0 by one rounding step."""
    # Each branch gets only its own side of -ln 2: torch.where also backpropagates through the branch that was
    # not selected, and an infinite gradient there would turn into NaN.
    split = -math.log(2)
    near = log_probability.clamp(min=split, max=-torch.finfo(log_probability.dtype).eps)
    far = log_probability.clamp(max=split)
    return torch.where(log_probability > split, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
