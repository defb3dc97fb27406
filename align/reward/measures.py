"""Reward model metrics in numpy: pairwise accuracy, calibration (ECE), Wilson interval, length bias."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
BINS = 10
"""Bins of the reliability curve; the score histogram has three times as many."""
Z95 = 1.959964
"""Two-sided 95 % quantile of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Scored comparisons: C completions in the order of their G groups.

    ``rewards``, ``ranks`` (0 is the best) and ``lengths`` (tokens): (C,); ``group_sizes``: (G,).
    """

    rewards: Numbers
    ranks: NDArray[np.int32]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def only(self, groups: NDArray[np.bool_]) -> "Scored":
        """Return the subset of groups selected by a boolean mask (G,)."""
        own = np.repeat(groups, self.sizes)
        return Scored(self.rewards[own], self.ranks[own], self.lengths[own], self.sizes[groups])


@dataclass(frozen=True, slots=True)
class Contests:
    """P pairs of completions of unequal rank.

    ``margins``: reward margin of the better completion; ``length_differences``: difference in tokens;
    ``weights``: sum to 1 over the pairs of a group. All have shape (P,).
    """

    leads: Numbers
    longer: NDArray[np.int64]
    weights: Numbers

    def share(self, values: Numbers | NDArray[np.int64]) -> float:
        """Return the weighted fraction of pairs with a positive value; a 0 counts half."""
        return float(np.average((np.sign(values) + 1) / 2, weights=self.weights))


def contests(scored: Scored) -> Contests:
    """Return all pairs of unequal rank within their groups."""
    found = list(_contests(scored))
    leads, longer, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Contests(leads, longer, weights)


def _contests(scored: Scored) -> Iterator[tuple[Numbers, NDArray[np.int64], Numbers]]:
    ends = np.cumsum(scored.sizes)
    for start, end in zip(ends - scored.sizes, ends, strict=True):
        ranks, rewards = scored.ranks[start:end], scored.rewards[start:end]
        lengths = scored.lengths[start:end]
        better, other = np.nonzero(ranks[:, None] < ranks[None, :])
        if len(better):
            weights = np.full(len(better), 1 / len(better))
            yield rewards[better] - rewards[other], lengths[better] - lengths[other], weights


def measured(scored: Scored) -> dict[str, Any]:
    """Return the metrics of scored comparisons; each has weight 1, whatever its number of pairs."""
    pairs = contests(scored)
    accuracy = pairs.share(pairs.leads)
    count = round(pairs.weights.sum())
    error, curve = calibration(pairs.leads, pairs.weights)
    best = scored.ranks == 0
    return {
        "comparisons": count,
        "pairs": len(pairs.leads),
        "accuracy": accuracy,
        "interval": list(wilson(accuracy, count)),
        "loss": float(np.average(np.logaddexp(0, -pairs.leads), weights=pairs.weights)),
        "margin": float(np.average(pairs.leads, weights=pairs.weights)),
        "calibration_error": error,
        "reliability": curve,
        "longer_is_better": pairs.share(pairs.longer),
        "correlation_with_length": spearman(scored.rewards, scored.lengths),
        "chosen": _spread(scored.rewards[best]),
        "rejected": _spread(scored.rewards[~best]),
        "histogram": histogram(scored.rewards[best], scored.rewards[~best]),
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion over ``count`` independent cases.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference". Unlike the normal
    approximation it stays within [0, 1] and has a nonzero width at proportions of 0 and 1.

    >>> [round(end, 3) for end in wilson(0.9, 100)]
    [0.826, 0.945]
    """
    middle = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration(leads: Numbers, weights: Numbers) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error (ECE) of s(r_w - r_l) and its reliability curve.

    ECE = sum_b (n_b / n) |accuracy_b - confidence_b| over bins of the confidence, which is from 1/2 to 1
    for pairs (Guo et al. 2017, arXiv 1706.04599, equation 3).
    """
    # The model's confidence in the order that it predicts, which is not always the labeled one.
    said = 1 / (1 + np.exp(-np.abs(leads)))
    right = (np.sign(leads) + 1) / 2
    bins = np.minimum(((said - 0.5) * 2 * BINS).astype(int), BINS - 1)
    curve, error = [], 0.0
    for number in np.unique(bins):
        own = bins == number
        part = float(weights[own].sum() / weights.sum())
        mean, hits = (float(np.average(values[own], weights=weights[own])) for values in (said, right))
        curve.append({"said": mean, "right": hits, "share": part})
        error += part * abs(hits - mean)
    return error, curve


def spearman(one: NDArray[Any], other: NDArray[Any]) -> float | None:
    """Return Spearman's rank correlation; None if either input is constant."""
    ranks = [_mean_ranks(values) for values in (one, other)]
    if any(values.std() == 0 for values in ranks):
        return None
    one, other = (values - values.mean() for values in ranks)
    return float((one * other).mean() / (one.std() * other.std()))


def _mean_ranks(values: NDArray[Any]) -> Numbers:
    """Return ranks, with ties at their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def histogram(chosen: Numbers, rejected: Numbers) -> dict[str, list[float]]:
    """Return histogram counts of both kinds of scores over common bin edges."""
    borders = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=3 * BINS)
    counts = [np.histogram(values, borders)[0].tolist() for values in (chosen, rejected)]
    return {"borders": borders.tolist(), "chosen": counts[0], "rejected": counts[1]}


def _spread(values: Numbers) -> dict[str, float]:
    return {"mean": float(values.mean()), "deviation": float(values.std())}
