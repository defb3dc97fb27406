"""PPO losses per token (clipped policy loss, clipped value loss, entropy), and explained variance.

Masked-out entries are never read: they may be NaN, and their gradient is exactly 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.rl.maths.masked import masked_var
from finetune.training.loss import MAX_ELEMENTS


class PolicyLoss(NamedTuple):
    """Policy loss per token.

    Attributes:
        losses: (C, T), with gradient; exactly 0 outside the mask.
        ratios: (C, T), pi / pi_old, without gradient; 1 outside the mask.
        clipped: (C, T) bool, where the clipped term is the larger one: no gradient there.
    """

    losses: Tensor
    ratios: Tensor
    clipped: Tensor


class ValueLoss(NamedTuple):
    """Value loss per token.

    Attributes:
        losses: (C, T), with gradient; exactly 0 outside the mask.
        clipped: (C, T) bool, where the clipped term is the larger one: no gradient there.
    """

    losses: Tensor
    clipped: Tensor


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
) -> PolicyLoss:
    """Return the PPO clip loss max(-A r, -A clip(r, 1 - c, 1 + c)) per token, with r = pi / pi_old.

    This is the negative clipped surrogate objective (arXiv 1707.06347, equation 7). At r = 1 its
    gradient is -A grad log pi. Where a step has already gone as far as the clip allows in the advantage's
    direction the gradient is 0; a step in the wrong direction is never clipped.

    Args:
        logps_CT: (C, T), of the sampled tokens under the current policy.
        old_logps_CT: the same under the policy that sampled them.
        advantages_CT: (C, T).
        mask_CT: (C, T) bool, true at the completions' tokens.
        clip_range: c; 0.2 in the paper and in arXiv 2403.17031.

    Ratios 2, 2, 1/2: a positive advantage gains at most 1.2, a negative one is not clipped at 2.

    >>> logps = torch.tensor([[2.0, 2.0, 0.5]]).log()
    >>> gains = torch.tensor([[1.0, -1.0, -1.0]])
    >>> loss = policy_loss(logps, torch.zeros(1, 3), gains, torch.ones(1, 3, dtype=torch.bool), clip=0.2)
    >>> loss.losses
    tensor([[-1.2000,  2.0000,  0.8000]])
    >>> loss.clipped
    tensor([[ True, False,  True]])
    """
    # The inputs are masked too: NaN outside the mask would reach the gradients as NaN * 0.
    advantages = advantages.masked_fill(~mask, 0.0)
    ratios = (logps - old_logps).masked_fill(~mask, 0.0).exp()
    losses = -advantages * ratios
    held = -advantages * ratios.clamp(1 - clip, 1 + clip)
    # The larger loss is the pessimistic one: clipping never hides that a step went the wrong way.
    clipped = held > losses
    return PolicyLoss(torch.where(clipped, held, losses).masked_fill(~mask, 0.0), ratios.detach(), clipped)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> ValueLoss:
    """Return 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) per token.

    The clipped loss of OpenAI's PPO ("The N implementation details of RLHF with PPO"; arXiv 2005.12729
    writes it out among PPO's code-level optimizations, and arXiv 2403.17031 uses it).

    Args:
        values_CT: (C, T), of the current value model.
        old_values_CT: the same at sampling time.
        returns_CT: (C, T), the regression targets.
        mask_CT: (C, T) bool, true at the completions' tokens.
        clip_range: c, 0.2 in the last paper; None: squared errors without clipping.

    Values 3 and 1 before and after, return 0: 1/2 (3 - 0.2)^2 is more than 1/2.

    >>> values, old, mask = torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[True]])
    >>> value_loss(values, old, torch.zeros(1, 1), mask, clip=0.2)
    ValueLoss(losses=tensor([[3.9200]]), clipped=tensor([[True]]))
    >>> value_loss(values, old, torch.zeros(1, 1), mask, clip=None).losses
    tensor([[0.5000]])
    """
    # As in the policy loss: NaN outside the mask must not reach the gradients.
    values, old_values, returns = (part.masked_fill(~mask, 0.0) for part in (values, old_values, returns))
    losses = (values - returns) ** 2
    if clip is None:
        return ValueLoss(0.5 * losses, torch.zeros_like(mask))
    held = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    clipped = held > losses
    return ValueLoss(0.5 * torch.where(clipped, held, losses), clipped)


def entropy(logits: Tensor, *, max_elements: int = MAX_ELEMENTS) -> Tensor:
    """Return the entropy H_n = -sum_v p_nv log p_nv of p_n = softmax(logits_n), in nats, with gradient.

    Logits may be -inf: such a token counts 0.

    Args:
        logits_NV: (N, V), any floating type, already divided by the temperature.
        max_elements: maximum number of logits per chunk.

    Returns:
        (N,) float32. Of a fair coin ln 2, of a certain outcome 0:

    >>> entropy(torch.tensor([[3.0, 3.0], [0.0, -float("inf")]]))
    tensor([0.6931, 0.0000])
    """
    rows = max(1, max_elements // logits.shape[-1])
    if len(logits) <= rows:
        return _entropy(logits)
    # Recomputed in the backward pass: the float32 copies of one chunk are alive at a time, not all (N, V).
    return torch.cat([checkpoint(_entropy, part, use_reentrant=False) for part in torch.split(logits, rows)])


def _entropy(logits: Tensor) -> Tensor:
    logps = logits.float().log_softmax(-1)
    shares = logps.exp()
    # p log p is 0 at p = 0, where 0 * -inf would be NaN.
    return (shares * -logps.masked_fill(shares == 0, 0.0)).sum(-1)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return the explained variance 1 - Var(R - V) / Var(R): 1 is perfect, 0 is as good as a constant.

    Below 0 the values are worse than a constant. If all returns are equal it is NaN, or -inf if the values
    differ. J. Schulman's diagnostic of PPO's value function.

    Args:
        values_CT: (C, T), at sampling time.
        returns_CT: (C, T).
        mask_CT: (C, T) bool, true at the completions' tokens.

    Returns:
        A scalar. Returns 0 and 4 (variance 8), errors 1 and 3 (variance 2):

    >>> returns, mask = torch.tensor([[0.0, 4.0]]), torch.tensor([[True, True]])
    >>> explained_variance(torch.tensor([[-1.0, 1.0]]), returns, mask)
    tensor(0.7500)
    """
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask)
