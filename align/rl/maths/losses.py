"""What PPO minimises, token by token, and what tells how it goes.

What stands where the mask is false is never read: it may be NaN, and its gradient is exactly 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.rl.maths.masked import masked_var
from finetune.training.loss import MAX_ELEMENTS


class PolicyLoss(NamedTuple):
    """The policy's loss of each token.

    Attributes:
        losses: (episodes, tokens), with gradient; exactly 0 where the mask is false.
        ratios: (episodes, tokens), pi / pi_old, without gradient; 1 where the mask is false.
        clipped: bool (episodes, tokens), where the clipped term is the one that counts: no gradient there.
    """

    losses: Tensor
    ratios: Tensor
    clipped: Tensor


class ValueLoss(NamedTuple):
    """The value's loss of each token.

    Attributes:
        losses: (episodes, tokens), with gradient; exactly 0 where the mask is false.
        clipped: bool (episodes, tokens), where the clipped term is the one that counts: no gradient there.
    """

    losses: Tensor
    clipped: Tensor


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
) -> PolicyLoss:
    """Return max(-A r, -A clip(r, 1 - c, 1 + c)) of each token, with r = pi / pi_old.

    The clipped surrogate objective with its sign turned (arXiv 1707.06347, equation 7). At r = 1 its
    gradient is -A grad log pi. Where a step has already gone as far as the clip allows in the advantage's
    direction the gradient is 0; a step in the wrong direction is never clipped.

    Args:
        logps: (episodes, tokens), of the sampled tokens under the policy that learns.
        old_logps: the same under the policy that sampled them.
        advantages: (episodes, tokens).
        mask: bool (episodes, tokens), true at the episodes' tokens.
        clip: c; 0.2 in the paper and in arXiv 2403.17031.

    Ratios 2, 2, 1/2: a better token gains up to 1.2 and no more, a worse one is paid in full.

    >>> logps = torch.tensor([[2.0, 2.0, 0.5]]).log()
    >>> gains = torch.tensor([[1.0, -1.0, -1.0]])
    >>> loss = policy_loss(logps, torch.zeros(1, 3), gains, torch.ones(1, 3, dtype=torch.bool), clip=0.2)
    >>> loss.losses
    tensor([[-1.2000,  2.0000,  0.8000]])
    >>> loss.clipped
    tensor([[ True, False,  True]])
    """
    advantages = advantages.masked_fill(~mask, 0.0)
    ratios = (logps - old_logps).masked_fill(~mask, 0.0).exp()
    losses = -advantages * ratios
    held = -advantages * ratios.clamp(1 - clip, 1 + clip)
    clipped = held > losses
    return PolicyLoss(torch.where(clipped, held, losses).masked_fill(~mask, 0.0), ratios.detach(), clipped)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> ValueLoss:
    """Return 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) of each token.

    The clipped loss of OpenAI's PPO ("The N implementation details of RLHF with PPO"; arXiv 2005.12729
    writes it out among PPO's code-level optimizations, and arXiv 2403.17031 uses it).

    Args:
        values: (episodes, tokens), of the model that learns.
        old_values: the same when the episodes were sampled.
        returns: (episodes, tokens), what they are to learn.
        mask: bool (episodes, tokens), true at the episodes' tokens.
        clip: c, 0.2 in the last; None: squared errors, not clipped.

    Values 3 and 1 before and after, return 0: 1/2 (3 - 0.2)^2 is more than 1/2.

    >>> values, old, mask = torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[True]])
    >>> value_loss(values, old, torch.zeros(1, 1), mask, clip=0.2)
    ValueLoss(losses=tensor([[3.9200]]), clipped=tensor([[True]]))
    >>> value_loss(values, old, torch.zeros(1, 1), mask, clip=None).losses
    tensor([[0.5000]])
    """
    values, old_values, returns = (part.masked_fill(~mask, 0.0) for part in (values, old_values, returns))
    losses = (values - returns) ** 2
    if clip is None:
        return ValueLoss(0.5 * losses, torch.zeros_like(mask))
    held = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    clipped = held > losses
    return ValueLoss(0.5 * torch.where(clipped, held, losses), clipped)


def entropy(logits: Tensor, *, max_elements: int = MAX_ELEMENTS) -> Tensor:
    """Return H_n = -sum_v p_nv log p_nv of p_n = softmax(logits_n), in nats and float32, with gradient.

    Over a large vocabulary this is done chunk by chunk and again in the backward pass, so that one chunk's
    float32 copies are alive at a time and not all of them. Logits may be -inf: such a token counts 0.

    Args:
        logits: (positions, vocabulary), any floating type, already divided by the temperature.
        max_elements: logits per chunk at most.

    Returns:
        (positions,). Of a fair coin ln 2, of a certain outcome 0:

    >>> entropy(torch.tensor([[3.0, 3.0], [0.0, -float("inf")]]))
    tensor([0.6931, 0.0000])
    """
    rows = max(1, max_elements // logits.shape[-1])
    if len(logits) <= rows:
        return _entropy(logits)
    return torch.cat([checkpoint(_entropy, part, use_reentrant=False) for part in torch.split(logits, rows)])


def _entropy(logits: Tensor) -> Tensor:
    logps = logits.float().log_softmax(-1)
    shares = logps.exp()
    return (shares * -logps.masked_fill(shares == 0, 0.0)).sum(-1)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(R - V) / Var(R): 1 where values foretell the returns, 0 where a constant does as well.

    Below 0 the values do harm. Returns that are all equal leave nothing to explain: NaN, or -inf where the
    values differ from each other. J. Schulman's measure of PPO's value function.

    Args:
        values: (episodes, tokens), when the episodes were sampled.
        returns: (episodes, tokens).
        mask: bool (episodes, tokens), true at the episodes' tokens.

    Returns:
        A scalar. Returns 0 and 4 (variance 8), errors 1 and 3 (variance 2):

    >>> returns, mask = torch.tensor([[0.0, 4.0]]), torch.tensor([[True, True]])
    >>> explained_variance(torch.tensor([[-1.0, 1.0]]), returns, mask)
    tensor(0.7500)
    """
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask)
