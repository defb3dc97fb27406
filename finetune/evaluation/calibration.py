"""Calibration of probabilities: reliability curve and expected calibration error."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
NUM_BINS = 10
"""Bins of a reliability curve."""


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
