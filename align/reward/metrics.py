"""Reward model metrics in numpy: pairwise accuracy, calibration (ECE), Wilson interval, length bias."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.calibration import FloatArray, calibration_error
from finetune.evaluation.small_samples import wilson_interval

HISTOGRAM_BINS = 30
"""Bins of the score histogram."""


@dataclass(frozen=True, slots=True)
class ScoredComparisons:
    """Scored comparisons: C completions in the order of their G groups.

    ``rewards``, ``ranks`` (0 is the best) and ``lengths`` (tokens): (C,); ``group_sizes``: (G,).
    """

    rewards: FloatArray
    ranks: NDArray[np.int32]
    lengths: NDArray[np.int64]
    group_sizes: NDArray[np.int64]

    def select(self, group_mask: NDArray[np.bool_]) -> "ScoredComparisons":
        """Return the subset of groups selected by a boolean mask (G,)."""
        completion_mask = np.repeat(group_mask, self.group_sizes)
        return ScoredComparisons(
            self.rewards[completion_mask],
            self.ranks[completion_mask],
            self.lengths[completion_mask],
            self.group_sizes[group_mask],
        )


@dataclass(frozen=True, slots=True)
class PairComparisons:
    """P pairs of completions of unequal rank.

    ``margins``: reward margin of the better completion; ``length_differences``: difference in tokens;
    ``weights``: sum to 1 over the pairs of a group. All have shape (P,).
    """

    margins: FloatArray
    length_differences: NDArray[np.int64]
    weights: FloatArray

    def positive_fraction(self, values: FloatArray | NDArray[np.int64]) -> float:
        """Return the weighted fraction of pairs with a positive value; a 0 counts half."""
        return float(np.average((np.sign(values) + 1) / 2, weights=self.weights))


def pair_comparisons(comparisons: ScoredComparisons) -> PairComparisons:
    """Return all pairs of unequal rank within their groups."""
    pair_arrays = list(_iter_pairs(comparisons))
    margins, length_differences, weights = (
        np.concatenate(arrays) for arrays in zip(*pair_arrays, strict=True)
    )
    return PairComparisons(margins, length_differences, weights)


def _iter_pairs(comparisons: ScoredComparisons) -> Iterator[tuple[FloatArray, NDArray[np.int64], FloatArray]]:
    group_ends = np.cumsum(comparisons.group_sizes)
    for start, end in zip(group_ends - comparisons.group_sizes, group_ends, strict=True):
        ranks, rewards = comparisons.ranks[start:end], comparisons.rewards[start:end]
        lengths = comparisons.lengths[start:end]
        better, other = np.nonzero(ranks[:, None] < ranks[None, :])
        if len(better):
            weights = np.full(len(better), 1 / len(better))
            yield rewards[better] - rewards[other], lengths[better] - lengths[other], weights


def comparison_metrics(comparisons: ScoredComparisons) -> dict[str, Any]:
    """Return the metrics of scored comparisons; each has weight 1, whatever its number of pairs."""
    pairs = pair_comparisons(comparisons)
    accuracy = pairs.positive_fraction(pairs.margins)
    # Weights sum to 1 per comparison, up to rounding.
    count = round(pairs.weights.sum())
    pair_calibration_error, curve = calibration(pairs.margins, pairs.weights)
    is_best = comparisons.ranks == 0
    return {
        "comparisons": count,
        "pairs": len(pairs.margins),
        "accuracy": accuracy,
        "interval": list(wilson_interval(accuracy, count)),
        # -log s(m) = log(1 + e^-m), without overflow.
        "loss": float(np.average(np.logaddexp(0, -pairs.margins), weights=pairs.weights)),
        "margin": float(np.average(pairs.margins, weights=pairs.weights)),
        "calibration_error": pair_calibration_error,
        "reliability": curve,
        "longer_is_better": pairs.positive_fraction(pairs.length_differences),
        "correlation_with_length": spearman(comparisons.rewards, comparisons.lengths),
        "chosen": _mean_and_std(comparisons.rewards[is_best]),
        "rejected": _mean_and_std(comparisons.rewards[~is_best]),
        "histogram": histogram(comparisons.rewards[is_best], comparisons.rewards[~is_best]),
    }


def calibration(margins: FloatArray, weights: FloatArray) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error (ECE) of s(r_w - r_l) and its reliability curve.

    The confidence is from 1/2 to 1 for pairs.
    """
    # The model's confidence in the order that it predicts, which is not always the labeled one.
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    correct = (np.sign(margins) + 1) / 2
    return calibration_error(confidence, correct, weights, lowest=0.5)


def spearman(x: NDArray[Any], y: NDArray[Any]) -> float | None:
    """Return Spearman's rank correlation; None if either input is constant."""
    ranks = [_mean_ranks(values) for values in (x, y)]
    if any(values.std() == 0 for values in ranks):
        return None
    x, y = (values - values.mean() for values in ranks)
    return float((x * y).mean() / (x.std() * y.std()))


def _mean_ranks(values: NDArray[Any]) -> FloatArray:
    """Return ranks, with ties at their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def histogram(chosen: FloatArray, rejected: FloatArray) -> dict[str, list[float]]:
    """Return histogram counts of both kinds of scores over common bin edges."""
    # Common edges: the two histograms are drawn over each other.
    bin_edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=HISTOGRAM_BINS)
    counts = [np.histogram(values, bin_edges)[0].tolist() for values in (chosen, rejected)]
    return {"bin_edges": bin_edges.tolist(), "chosen": counts[0], "rejected": counts[1]}


def _mean_and_std(values: FloatArray) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std())}
