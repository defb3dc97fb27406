"""Per-token rewards with KL penalty, and generalized advantage estimation (GAE)."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def token_rewards(kl: Tensor, scores: Tensor, lengths: Tensor, *, coefficient: float) -> Tensor:
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

    >>> kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> token_rewards(kl, torch.tensor([10.0, 20.0]), torch.tensor([3, 1]), coefficient=0.5)
    tensor([[-0.5000, -1.0000,  8.5000],
            [18.0000,  0.0000,  0.0000]])
    """
    columns = torch.arange(kl.shape[1], device=kl.device)
    # where and not a product with the mask: the entries after the end may be NaN.
    rewards = torch.where(columns < lengths[:, None], -coefficient * kl, 0.0)
    return rewards + torch.where(columns == lengths[:, None] - 1, scores[:, None], 0.0)


@torch.no_grad()
def advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float, trace: float
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

    >>> rewards, values = torch.tensor([[0.0, 4.0], [5.0, 9.0]]), torch.tensor([[2.0, 3.0], [7.0, 9.0]])
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> found, returns = advantages(rewards, values, mask, discount=1.0, trace=0.5)
    >>> found
    tensor([[ 1.5000,  1.0000],
            [-2.0000,  0.0000]])
    >>> returns
    tensor([[3.5000, 4.0000],
            [5.0000, 0.0000]])
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    # V_{t+1}, with 0 after the last token.
    deltas = rewards + discount * F.pad(values[:, 1:], (0, 1)) - values
    found, later = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    # A_t depends on A_{t+1}: from the last position back, for all completions at once.
    for column in reversed(range(deltas.shape[1])):
        later = deltas[:, column] + discount * trace * later
        found[:, column] = later
    return found, found + values
