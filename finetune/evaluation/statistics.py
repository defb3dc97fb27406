"""Statistics of proportions in numpy: Wilson interval, reliability curve and expected calibration error."""

from math import sqrt

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
NUM_BINS = 10
"""Bins of a reliability curve."""
Z_95 = 1.959964
"""Two-sided 95 % quantile of the standard normal distribution."""


def wilson_interval(proportion: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion over ``count`` independent cases.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference". Unlike the normal
    approximation it stays within [0, 1] and has a nonzero width at proportions of 0 and 1.

    >>> [round(end, 3) for end in wilson_interval(0.9, 100)]
    [0.826, 0.945]
    """
    center = (proportion + Z_95**2 / (2 * count)) / (1 + Z_95**2 / count)
    half_width = (
        Z_95 / (1 + Z_95**2 / count) * sqrt(proportion * (1 - proportion) / count + Z_95**2 / (4 * count**2))
    )
    return max(0.0, center - half_width), min(1.0, center + half_width)


def calibration_error(
    confidence: FloatArray, correct: FloatArray, weights: FloatArray, *, lowest: float = 0.0
) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error (ECE) of predictions, and their reliability curve.

    ECE = sum_b (n_b / n) |accuracy_b - confidence_b| over ten bins of the confidence of equal width
    (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
        confidence: probability of each prediction, (N,).
        correct: 1 where it is right, 0 where it is wrong, (N,).
        weights: weight of each prediction, (N,).
        lowest: the lowest confidence possible, where the first bin begins; the last one ends at 1.

    >>> error, curve = calibration_error(np.array([0.95, 0.95]), np.array([1.0, 0.0]), np.ones(2))
    >>> round(error, 2), curve
    (0.45, [{'confidence': 0.95, 'accuracy': 0.5, 'fraction': 1.0}])
    """
    # A confidence of exactly 1 belongs to the last bin.
    bin_indices = np.minimum(((confidence - lowest) / (1 - lowest) * NUM_BINS).astype(int), NUM_BINS - 1)
    curve, error = [], 0.0
    for bin_index in np.unique(bin_indices):
        in_bin = bin_indices == bin_index
        bin_weight = float(weights[in_bin].sum() / weights.sum())
        bin_confidence, bin_accuracy = (
            float(np.average(values[in_bin], weights=weights[in_bin])) for values in (confidence, correct)
        )
        curve.append({"confidence": bin_confidence, "accuracy": bin_accuracy, "fraction": bin_weight})
        error += bin_weight * abs(bin_accuracy - bin_confidence)
    return error, curve
