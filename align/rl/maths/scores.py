"""What is done to an episode's score before it becomes a reward.

Every function takes and returns (episodes,) tensors and changes none in place.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from align.rl.maths.masked import whiten

SAFETY_THRESHOLD = 0.15
"""Below it Llama 2 takes a reply for unsafe (arXiv 2307.09288, section 3.2.3)."""


def missing_end(scores: Tensor, stopped: Tensor, *, value: float | None) -> Tensor:
    """Return the scores with those of episodes that never ended replaced.

    A reward model has learnt scores of replies that end, so it says nothing about one that does not: the "EOS
    trick" of arXiv 2403.17031, detail 23, whose value is -1. TRL's `missing_eos_penalty` is another rule:
    it subtracts, which is ``missing_end_penalty``.

    Args:
        scores: (episodes,).
        stopped: bool (episodes,), whether the episode ended with the end-of-sequence token.
        value: the score of an episode that did not; None leaves the scores as they are.

    >>> missing_end(torch.tensor([3.0, 5.0]), torch.tensor([True, False]), value=-1.0)
    tensor([ 3., -1.])
    """
    return scores if value is None else scores.masked_fill(~stopped, value)


def missing_end_penalty(scores: Tensor, stopped: Tensor, *, penalty: float | None) -> Tensor:
    """Return the scores, those of episodes that never ended lower by a penalty.

    TRL's `missing_eos_penalty`; unlike the paper's rule (``missing_end``) it keeps the order of the episodes
    that did not end.

    Args:
        scores: (episodes,).
        stopped: bool (episodes,), whether the episode ended with the end-of-sequence token.
        penalty: what is subtracted, 0 or more; None leaves the scores as they are.

    >>> missing_end_penalty(torch.tensor([3.0, 5.0]), torch.tensor([True, False]), penalty=1.0)
    tensor([3., 4.])
    """
    return scores if penalty is None else torch.where(stopped, scores, scores - penalty)


def length_penalty(lengths: Tensor, *, per_token: float, free: int) -> Tensor:
    """Return -c max(0, length - free), to be added to the scores.

    Against replies that grow because length is rewarded (arXiv 2310.03716 shows how much of RLHF's gain that
    is, and tries penalties linear in the length).

    Args:
        lengths: (episodes,), tokens.
        per_token: c, 0 or more.
        free: tokens that cost nothing.

    >>> length_penalty(torch.tensor([10, 14]), per_token=0.5, free=12)
    tensor([ 0., -1.])
    """
    return per_token * (free - lengths).clamp(max=0).float()


def clip_scores(scores: Tensor, *, limit: float) -> Tensor:
    """Return the scores, held within -limit and limit (part of arXiv 2307.04964's score reparameterization).

    >>> clip_scores(torch.tensor([-9.0, 2.0]), limit=5.0)
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

    >>> Running().updated(torch.tensor([1.0, 3.0])).updated(torch.tensor([8.0]))
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

        >>> Running(count=3, mean=4.0, m2=8.0).normalise(torch.tensor([2.0, 8.0]), shift_mean=True)
        tensor([-1.,  2.])
        >>> Running(count=3, mean=4.0, m2=8.0).normalise(torch.tensor([2.0, 8.0]), shift_mean=False)
        tensor([1., 4.])
        """
        return (scores - (self.mean if shift_mean else 0.0)) / self.deviation


def piecewise(
    helpfulness: Tensor, safety: Tensor, *, is_risky: Tensor, threshold: float = SAFETY_THRESHOLD
) -> Tensor:
    """Return the safety score where the prompt is risky or the reply unsafe, else the helpfulness score.

    R_c = R_s if is_safety(p) or R_s < 0.15, else R_h: Llama 2 (arXiv 2307.09288, section 3.2.3), where 0.15
    found unsafe replies with a precision of 0.89 and a recall of 0.55.

    Args:
        helpfulness: (episodes,), R_h, after the sigmoid: from 0 to 1.
        safety: (episodes,), R_s, after the sigmoid.
        is_risky: bool (episodes,), whether the prompt was marked as one that may draw an unsafe reply.
        threshold: the safety score below which a reply counts as unsafe whatever the prompt.

    >>> safety = torch.tensor([0.75, 0.75, 0.125])
    >>> piecewise(torch.full((3,), 0.5), safety, is_risky=torch.tensor([True, False, False]))
    tensor([0.7500, 0.5000, 0.1250])
    """
    return torch.where(is_risky | (safety < threshold), safety, helpfulness)


def logit_whiten(scores: Tensor, *, smallest: float = 1e-6) -> Tensor:
    """Return whiten(logit(R)): the linear scores back from the sigmoid, with mean 0 and deviation 1.

    R~ = whiten(logit(R_c)) of Llama 2 (arXiv 2307.09288, section 3.2.3), over the episodes of a rollout.

    Args:
        scores: (episodes,), from 0 to 1.
        smallest: scores are held this far from 0 and from 1, where the logit has no end.

    The logits of 1/4, 1/2, 3/4 are -ln 3, 0, ln 3:

    >>> logit_whiten(torch.tensor([0.25, 0.5, 0.75]))
    tensor([-1.,  0.,  1.])
    """
    linear = torch.logit(scores, eps=smallest)
    return whiten(linear, torch.ones_like(linear, dtype=torch.bool), shift_mean=True)
