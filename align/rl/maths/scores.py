"""What is done to an episode's score before it becomes a reward.

Every function takes and returns (episodes,) tensors and changes none in place.
"""

import math
from dataclasses import dataclass

from torch import Tensor


def missing_end(scores: Tensor, stopped: Tensor, *, value: float | None) -> Tensor:
    """Return the scores with those of episodes that never ended replaced.

    A reward model has learnt scores of replies that end, so it says nothing about one that does not: the "EOS
    trick" of arXiv 2403.17031, detail 23, whose value is -1. TRL's `missing_eos_penalty` is another rule: it
    subtracts from whatever the score is.

    Args:
        scores: (episodes,).
        stopped: bool (episodes,), whether the episode ended with the end-of-sequence token.
        value: the score of an episode that did not; None leaves the scores as they are.

    >>> from torch import tensor
    >>> missing_end(tensor([3.0, 5.0]), tensor([True, False]), value=-1.0)
    tensor([ 3., -1.])
    """
    return scores if value is None else scores.masked_fill(~stopped, value)


def clip_scores(scores: Tensor, *, limit: float) -> Tensor:
    """Return the scores, held within -limit and limit (part of arXiv 2307.04964's score reparameterization).

    >>> from torch import tensor
    >>> clip_scores(tensor([-9.0, 2.0]), limit=5.0)
    tensor([-5.,  2.])
    """
    return scores.clamp(-limit, limit)


@dataclass(frozen=True, slots=True)
class Running:
    """Mean and spread of all the scores that were seen.

    In double precision whatever the scores are; `dataclasses.asdict` gives three numbers that JSON writes and
    reads back exactly, and ``Running(**numbers)`` is the same again.

    Attributes:
        count: scores seen.
        mean: theirs; 0 before the first.
        m2: the sum of the squares of their distances from it.

    Scores 1, 3, then 8: mean 4, squares 9 + 1 + 16.

    >>> from torch import tensor
    >>> Running().updated(tensor([1.0, 3.0])).updated(tensor([8.0]))
    Running(count=3, mean=4.0, m2=26.0)
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def updated(self, scores: Tensor) -> "Running":
        """Return the statistics with these scores besides: (episodes,), one or more.

        Chan, Golub and LeVeque (1979), the pairwise form of Welford's update: with d = mean_b - mean_a,
        mean = mean_a + d n_b / n and m2 = m2_a + m2_b + d^2 n_a n_b / n.
        """
        batch = scores.detach().double()
        count = self.count + len(batch)
        mean = batch.mean().item()
        apart = mean - self.mean
        m2 = self.m2 + ((batch - mean) ** 2).sum().item() + apart**2 * self.count * len(batch) / count
        return Running(count, self.mean + apart * len(batch) / count, m2)

    @property
    def deviation(self) -> float:
        """Return sqrt(m2 / (n - 1)), or 1 while no two scores differ and there is no spread."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.m2 > 0 else 1.0

    def normalise(self, scores: Tensor, shift_mean: bool) -> Tensor:
        """Return (x - mean) / deviation, or x / deviation where the mean is not to be shifted away.

        Unlike ``whiten``, which puts the mean back, the latter scales it too: over a run the reward's size
        is what the KL coefficient is set against.

        Args:
            scores: (episodes,).
            shift_mean: whether the mean becomes 0.

        >>> from torch import tensor
        >>> Running(count=3, mean=4.0, m2=8.0).normalise(tensor([2.0, 8.0]), shift_mean=True)
        tensor([-1.,  2.])
        >>> Running(count=3, mean=4.0, m2=8.0).normalise(tensor([2.0, 8.0]), shift_mean=False)
        tensor([1., 4.])
        """
        return (scores - (self.mean if shift_mean else 0.0)) / self.deviation
