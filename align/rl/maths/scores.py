"""Reward shaping per completion: EOS trick, clipping, normalization by running statistics.

Every function takes and returns (C,) tensors and changes none in place.
"""

import math
from dataclasses import dataclass

from torch import Tensor


def missing_end(scores: Tensor, stopped: Tensor, *, value: float | None) -> Tensor:
    """Return the scores with those of completions without EOS replaced.

    A reward model is trained on complete replies, so its score of an unfinished one means nothing: the "EOS
    trick" of arXiv 2403.17031, detail 23, whose value is -1. TRL's `missing_eos_penalty` is another rule: it
    subtracts from whatever the score is.

    Args:
        rewards_C: (C,).
        ended_with_eos_C: (C,) bool, whether the completion ended with EOS.
        missing_eos_reward: the score of completions that did not; None leaves the scores unchanged.

    >>> from torch import tensor
    >>> missing_end(tensor([3.0, 5.0]), tensor([True, False]), value=-1.0)
    tensor([ 3., -1.])
    """
    return scores if value is None else scores.masked_fill(~stopped, value)


def clip_scores(scores: Tensor, *, limit: float) -> Tensor:
    """Return the scores clipped to [-limit, limit] (part of arXiv 2307.04964's score reparameterization).

    >>> from torch import tensor
    >>> clip_scores(tensor([-9.0, 2.0]), limit=5.0)
    tensor([-5.,  2.])
    """
    return scores.clamp(-limit, limit)


@dataclass(frozen=True, slots=True)
class Running:
    """Running mean and standard deviation of all scores so far (Welford), in double precision.

    `dataclasses.asdict` gives three numbers that survive JSON exactly, for checkpoints.

    Attributes:
        count: number of scores.
        mean: their mean; 0 before the first.
        m2: sum of squared deviations from the mean.

    Scores 1, 3, then 8: mean 4, squares 9 + 1 + 16.

    >>> from torch import tensor
    >>> Running().updated(tensor([1.0, 3.0])).updated(tensor([8.0]))
    Running(count=3, mean=4.0, m2=26.0)
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def updated(self, scores: Tensor) -> "Running":
        """Return the statistics updated with scores (C,), one or more.

        Chan, Golub and LeVeque (1979), the pairwise form of Welford's update: with d = mean_b - mean_a,
        mean = mean_a + d n_b / n and m2 = m2_a + m2_b + d^2 n_a n_b / n.
        """
        # Rewards far from 0 lose their variance in float32.
        batch = scores.detach().double()
        count = self.count + len(batch)
        mean = batch.mean().item()
        apart = mean - self.mean
        m2 = self.m2 + ((batch - mean) ** 2).sum().item() + apart**2 * self.count * len(batch) / count
        return Running(count, self.mean + apart * len(batch) / count, m2)

    @property
    def deviation(self) -> float:
        """Return the standard deviation sqrt(m2 / (n - 1)), or 1 while all scores are equal."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.m2 > 0 else 1.0

    def normalise(self, scores: Tensor, shift_mean: bool) -> Tensor:
        """Return (x - mean) / std, or x / std if ``shift_mean`` is false.

        Unlike ``whiten``, which adds the mean back, the latter scales the mean too: the KL coefficient is
        relative to the size of the reward over the run.

        Args:
            rewards_C: (C,).
            shift_mean: whether the mean becomes 0.

        >>> from torch import tensor
        >>> Running(count=3, mean=4.0, m2=8.0).normalise(tensor([2.0, 8.0]), shift_mean=True)
        tensor([-1.,  2.])
        >>> Running(count=3, mean=4.0, m2=8.0).normalise(tensor([2.0, 8.0]), shift_mean=False)
        tensor([1., 4.])
        """
        return (scores - (self.mean if shift_mean else 0.0)) / self.deviation
