"""Tests of the difference between two models on the same items, and Holm's correction for several metrics."""

from collections.abc import Callable, Sequence
from math import sqrt

import numpy as np
from scipy.special import bdtr

from finetune.evaluation.calibration import FloatArray
from finetune.evaluation.small_samples import Z_95

MCNEMAR = "exact McNemar"
EXACT_SWAPS, RANDOM_SWAPS = "exact permutation of the models", "random permutation of the models"
NUM_SWAPS = 9_999
"""Permutations, besides the observed one: p-values down to 0.0001."""
CHUNK = 500
"""Permutations in memory at a time."""


def mcnemar_p_value(improved: int, regressed: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    Under the null hypothesis each of the discordant items is improved or regressed with probability 1/2.

    >>> mcnemar_p_value(6, 0)
    0.03125
    """
    return min(1.0, float(2 * bdtr(min(improved, regressed), improved + regressed, 0.5)))


def bonett_price_interval(improved: int, regressed: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a difference of paired proportions.

    A Wald interval with one more improved item, one more regressed item, and two more items. Its width is
    not 0 if no item differs. Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data".

    >>> [round(end, 3) for end in bonett_price_interval(0, 0, 98)]
    [-0.028, 0.028]
    """
    improved_rate, regressed_rate = (improved + 1) / (count + 2), (regressed + 1) / (count + 2)
    center = improved_rate - regressed_rate
    half_width = Z_95 * sqrt((improved_rate + regressed_rate - center**2) / (count + 2))
    return max(-1.0, center - half_width), min(1.0, center + half_width)


def swap_test(
    difference: Callable[[FloatArray, FloatArray], FloatArray],
    before_GV: FloatArray,
    after_GV: FloatArray,
    seed: int,
) -> tuple[float, str]:
    """Return the p-value of a permutation test that swaps the two models on clusters, and its name.

    For means it is the sign-flip test of the clusters' differences. All 2^D swaps of the D clusters that
    differ are used if they are fewer than 10,000. With five such clusters no p-value is below 2/32.

    Args:
        difference: the statistic, (P,), from the totals of both models in P permutations, (P, V) each.
        before_GV: sums of the first model's values in each cluster.
        after_GV: sums of the second model's values.
        seed: of random permutations.
    """
    shift_DV = (after_GV - before_GV)[np.any(after_GV != before_GV, axis=1)]
    before_V, after_V = before_GV.sum(axis=0), after_GV.sum(axis=0)
    # Swaps that only change the order of a sum are as extreme as the observed one.
    threshold = abs(difference(before_V[None], after_V[None])[0]) * (1 - 1e-9)

    def num_extreme(swaps_PD: FloatArray) -> int:
        moved_PV = swaps_PD @ shift_DV
        differences = np.abs(difference(before_V + moved_PV, after_V - moved_PV))
        # A permutation in which the statistic is undefined counts against the difference.
        return int(np.sum(~(differences < threshold)))

    size = len(shift_DV)
    if 2**size <= NUM_SWAPS:
        all_swaps_PD = (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(float)
        return num_extreme(all_swaps_PD) / 2**size, EXACT_SWAPS
    generator = np.random.default_rng(seed)
    extreme = 1
    for start in range(0, NUM_SWAPS, CHUNK):
        shape = (min(CHUNK, NUM_SWAPS - start), size)
        extreme += num_extreme(generator.integers(2, size=shape, dtype=np.int8).astype(float))
    return extreme / (NUM_SWAPS + 1), RANDOM_SWAPS


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that are corrected for their number (Holm 1979): their family's error rate holds.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
