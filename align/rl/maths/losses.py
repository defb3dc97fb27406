"""PPO losses per token (clipped policy loss, clipped value loss, entropy), and explained variance.

Masked-out entries are never read: they may be NaN, and their gradient is exactly 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.rl.maths.masked import masked_var
from finetune.training.loss import MAX_LOGITS_PER_CHUNK


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
    logps_CT: Tensor, old_logps_CT: Tensor, advantages_CT: Tensor, mask_CT: Tensor, *, clip_range: float
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

    >>> logps_CT = torch.tensor([[2.0, 2.0, 0.5]]).log()
    >>> gains = torch.tensor([[1.0, -1.0, -1.0]])
    >>> mask = torch.ones(1, 3, dtype=torch.bool)
    >>> loss = policy_loss(logps_CT, torch.zeros(1, 3), gains, mask, clip_range=0.2)
    >>> loss.losses
    tensor([[-1.2000,  2.0000,  0.8000]])
    >>> loss.clipped
    tensor([[ True, False,  True]])
    """
    # The inputs are masked too: NaN outside the mask would reach the gradients as NaN * 0.
    advantages_CT = advantages_CT.masked_fill(~mask_CT, 0.0)
    ratios_CT = (logps_CT - old_logps_CT).masked_fill(~mask_CT, 0.0).exp()
    losses_CT = -advantages_CT * ratios_CT
    clipped_losses_CT = -advantages_CT * ratios_CT.clamp(1 - clip_range, 1 + clip_range)
    # The larger loss is the pessimistic one: clipping never hides that a step went the wrong way.
    is_clipped_CT = clipped_losses_CT > losses_CT
    return PolicyLoss(
        torch.where(is_clipped_CT, clipped_losses_CT, losses_CT).masked_fill(~mask_CT, 0.0),
        ratios_CT.detach(),
        is_clipped_CT,
    )


def value_loss(
    values_CT: Tensor, old_values_CT: Tensor, returns_CT: Tensor, mask_CT: Tensor, *, clip_range: float | None
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

    >>> values_CT, old, mask_CT = torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[True]])
    >>> value_loss(values_CT, old, torch.zeros(1, 1), mask_CT, clip_range=0.2)
    ValueLoss(losses=tensor([[3.9200]]), clipped=tensor([[True]]))
    >>> value_loss(values_CT, old, torch.zeros(1, 1), mask_CT, clip_range=None).losses
    tensor([[0.5000]])
    """
    # As in the policy loss: NaN outside the mask must not reach the gradients.
    values_CT, old_values_CT, returns_CT = (
        tensor_CT.masked_fill(~mask_CT, 0.0) for tensor_CT in (values_CT, old_values_CT, returns_CT)
    )
    losses_CT = (values_CT - returns_CT) ** 2
    if clip_range is None:
        return ValueLoss(0.5 * losses_CT, torch.zeros_like(mask_CT))
    clipped_losses_CT = (
        values_CT.clamp(old_values_CT - clip_range, old_values_CT + clip_range) - returns_CT
    ) ** 2
    is_clipped_CT = clipped_losses_CT > losses_CT
    return ValueLoss(0.5 * torch.where(is_clipped_CT, clipped_losses_CT, losses_CT), is_clipped_CT)


def entropy(logits_NV: Tensor, *, max_elements: int = MAX_LOGITS_PER_CHUNK) -> Tensor:
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
    rows_per_chunk = max(1, max_elements // logits_NV.shape[-1])
    if len(logits_NV) <= rows_per_chunk:
        return _entropy(logits_NV)
    # Recomputed in the backward pass: the float32 copies of one chunk are alive at a time, not all (N, V).
    return torch.cat(
        [checkpoint(_entropy, chunk, use_reentrant=False) for chunk in torch.split(logits_NV, rows_per_chunk)]
    )


def _entropy(logits_NV: Tensor) -> Tensor:
    logps_NV = logits_NV.float().log_softmax(-1)
    probs_NV = logps_NV.exp()
    # p log p is 0 at p = 0, where 0 * -inf would be NaN.
    return (probs_NV * -logps_NV.masked_fill(probs_NV == 0, 0.0)).sum(-1)


@torch.no_grad()
def explained_variance(values_CT: Tensor, returns_CT: Tensor, mask_CT: Tensor) -> Tensor:
    """Return the explained variance 1 - Var(R - V) / Var(R): 1 is perfect, 0 is as good as a constant.

    Below 0 the values are worse than a constant. If all returns are equal it is NaN, or -inf if the values
    differ. J. Schulman's diagnostic of PPO's value function.

    Args:
        values_CT: (C, T), at sampling time.
        returns_CT: (C, T).
        mask_CT: (C, T) bool, true at the completions' tokens.

    Returns:
        A scalar. Returns 0 and 4 (variance 8), errors 1 and 3 (variance 2):

    >>> returns_CT, mask_CT = torch.tensor([[0.0, 4.0]]), torch.tensor([[True, True]])
    >>> explained_variance(torch.tensor([[-1.0, 1.0]]), returns_CT, mask_CT)
    tensor(0.7500)
    """
    return 1 - masked_var(returns_CT - values_CT, mask_CT) / masked_var(returns_CT, mask_CT)
