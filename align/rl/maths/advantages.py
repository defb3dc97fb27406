"""Per-token rewards with KL penalty, and generalized advantage estimation (GAE)."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def token_rewards(kl_CT: Tensor, scores_C: Tensor, lengths_C: Tensor, *, kl_coef: float) -> Tensor:
    """Return the per-token rewards: the KL penalty -beta kl_t, plus the score at the last token.

    Summed over a completion this is R(x, y) = r(x, y) - beta sum_t kl_t, the reward of Ziegler et al. (arXiv
    1909.08593, equation 2) and of InstructGPT (arXiv 2203.02155, equation 2).

    Args:
        kl_CT: (C, T), one of ``kl_terms``; entries after the end of a completion are not read.
        scores_C: (C,).
        lengths_C: (C,), tokens of each completion including EOS; 1 or more.
        kl_coef: beta.

    Returns:
        (C, T), without gradient; exactly 0 after the end of a completion.

    >>> kl_CT = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> token_rewards(kl_CT, torch.tensor([10.0, 20.0]), torch.tensor([3, 1]), kl_coef=0.5)
    tensor([[-0.5000, -1.0000,  8.5000],
            [18.0000,  0.0000,  0.0000]])
    """
    positions_T = torch.arange(kl_CT.shape[1], device=kl_CT.device)
    # where and not a product with the mask: the entries after the end may be NaN.
    rewards_CT = torch.where(positions_T < lengths_C[:, None], -kl_coef * kl_CT, 0.0)
    return rewards_CT + torch.where(positions_T == lengths_C[:, None] - 1, scores_C[:, None], 0.0)


@torch.no_grad()
def gae(
    rewards_CT: Tensor, values_CT: Tensor, mask_CT: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return GAE advantages, and the returns that are the targets of the value model.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = sum_l (gamma lambda)^l delta_{t+l} (arXiv 1506.02438,
    equation 16), computed backwards from the last token as A_t = delta_t + gamma lambda A_{t+1}. The value
    after the last token is 0, as the state is terminal. Returns are A + V.

    Args:
        rewards_CT: (C, T), ``token_rewards``.
        values_CT: (C, T), of the state before each token.
        mask_CT: (C, T) bool, true at a completion's tokens, which start at position 0 and are contiguous; no
            other entry is read.
        gamma: discount per token; 1 in arXiv 2403.17031.
        gae_lambda: lambda; 0.95 there.

    Returns:
        Two tensors (C, T), without gradient; exactly 0 after the end of a completion. With gamma 1 and
        lambda 1/2: delta = 0 + 3 - 2 and 4 - 3, so that A = 1 + 1/2 and 1; the second completion: 5 - 7.

    >>> rewards_CT, values_CT = torch.tensor([[0.0, 4.0], [5.0, 9.0]]), torch.tensor([[2.0, 3.0], [7.0, 9.0]])
    >>> mask_CT = torch.tensor([[True, True], [True, False]])
    >>> advantages_CT, returns = gae(rewards_CT, values_CT, mask_CT, gamma=1.0, gae_lambda=0.5)
    >>> advantages_CT
    tensor([[ 1.5000,  1.0000],
            [-2.0000,  0.0000]])
    >>> returns
    tensor([[3.5000, 4.0000],
            [5.0000, 0.0000]])
    """
    rewards_CT, values_CT = rewards_CT.masked_fill(~mask_CT, 0.0), values_CT.masked_fill(~mask_CT, 0.0)
    # V_{t+1}, with 0 after the last token.
    deltas_CT = rewards_CT + gamma * F.pad(values_CT[:, 1:], (0, 1)) - values_CT
    advantages_CT, next_advantage_C = torch.zeros_like(deltas_CT), torch.zeros_like(deltas_CT[:, 0])
    # A_t depends on A_{t+1}: from the last position back, for all completions at once.
    for t in reversed(range(deltas_CT.shape[1])):
        next_advantage_C = deltas_CT[:, t] + gamma * gae_lambda * next_advantage_C
        advantages_CT[:, t] = next_advantage_C
    return advantages_CT, advantages_CT + values_CT
