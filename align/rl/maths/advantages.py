"""From the rewards of completions to advantages per token.

The EOS trick, clipping and normalization by running statistics shape the rewards (C,). With the KL penalty
they become rewards per token (C, T), of which generalized advantage estimation (GAE) makes advantages and
returns. No function changes its arguments in place.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def apply_missing_eos_reward(
    rewards_C: Tensor, ended_with_eos_C: Tensor, *, missing_eos_reward: float | None
) -> Tensor:
    """Return the scores with those of completions without EOS replaced.

    A reward model is trained on complete replies, so its score of an unfinished one means nothing: the "EOS
    trick" of arXiv 2403.17031, detail 23, whose value is -1. TRL's `missing_eos_penalty` is another rule: it
    subtracts from whatever the score is.

    Args:
        rewards_C: (C,).
        ended_with_eos_C: (C,) bool, whether the completion ended with EOS.
        missing_eos_reward: the score of completions that did not; None leaves the scores unchanged.

    >>> from torch import tensor
    >>> apply_missing_eos_reward(tensor([3.0, 5.0]), tensor([True, False]), missing_eos_reward=-1.0)
    tensor([ 3., -1.])
    """
    return (
        rewards_C
        if missing_eos_reward is None
        else rewards_C.masked_fill(~ended_with_eos_C, missing_eos_reward)
    )


def clip_rewards(rewards_C: Tensor, *, limit: float) -> Tensor:
    """Return the scores clipped to [-limit, limit] (part of arXiv 2307.04964's score reparameterization).

    >>> from torch import tensor
    >>> clip_rewards(tensor([-9.0, 2.0]), limit=5.0)
    tensor([-5.,  2.])
    """
    return rewards_C.clamp(-limit, limit)


@dataclass(frozen=True, slots=True)
class RunningMeanStd:
    """Running mean and standard deviation of all scores so far (Welford), in double precision.

    `dataclasses.asdict` gives three numbers that survive JSON exactly, for checkpoints.

    Attributes:
        count: number of scores.
        mean: their mean; 0 before the first.
        m2: sum of squared deviations from the mean.

    Scores 1, 3, then 8: mean 4, squares 9 + 1 + 16.

    >>> from torch import tensor
    >>> RunningMeanStd().updated(tensor([1.0, 3.0])).updated(tensor([8.0]))
    RunningMeanStd(count=3, mean=4.0, m2=26.0)
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def updated(self, rewards_C: Tensor) -> "RunningMeanStd":
        """Return the statistics updated with scores (C,), one or more.

        Chan, Golub and LeVeque (1979), the pairwise form of Welford's update: with d = mean_b - mean_a,
        mean = mean_a + d n_b / n and m2 = m2_a + m2_b + d^2 n_a n_b / n.
        """
        # Rewards far from 0 lose their variance in float32.
        batch = rewards_C.detach().double()
        count = self.count + len(batch)
        mean = batch.mean().item()
        delta = mean - self.mean
        m2 = self.m2 + ((batch - mean) ** 2).sum().item() + delta**2 * self.count * len(batch) / count
        return RunningMeanStd(count, self.mean + delta * len(batch) / count, m2)

    @property
    def std(self) -> float:
        """Return the standard deviation sqrt(m2 / (n - 1)), or 1 while all scores are equal."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.m2 > 0 else 1.0

    def normalize(self, rewards_C: Tensor, shift_mean: bool) -> Tensor:
        """Return (x - mean) / std, or x / std if ``shift_mean`` is false.

        Unlike ``whiten``, which adds the mean back, the latter scales the mean too: the KL coefficient is
        relative to the size of the reward over the run.

        Args:
            rewards_C: (C,).
            shift_mean: whether the mean becomes 0.

        >>> from torch import tensor
        >>> RunningMeanStd(count=3, mean=4.0, m2=8.0).normalize(tensor([2.0, 8.0]), shift_mean=True)
        tensor([-1.,  2.])
        >>> RunningMeanStd(count=3, mean=4.0, m2=8.0).normalize(tensor([2.0, 8.0]), shift_mean=False)
        tensor([1., 4.])
        """
        return (rewards_C - (self.mean if shift_mean else 0.0)) / self.std


@torch.no_grad()
def token_rewards(kl_CT: Tensor, scores_C: Tensor, lengths_C: Tensor, *, kl_coef: float) -> Tensor:
    """Return the per-token rewards: the KL penalty -beta kl_t, plus the score at the last token.

    Summed over a completion this is R(x, y) = r(x, y) - beta sum_t kl_t, the reward of Ziegler et al. (arXiv
    1909.08593, equation 2) and of InstructGPT (arXiv 2203.02155, equation 2). The code of arXiv 2403.17031
    adds the score one position later, at the first padding token, if there is one.

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
