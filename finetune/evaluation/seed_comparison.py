"""Whether a recipe is better than another: the training seed is the unit.

Two models of one recipe differ, often by more than their prompts can explain. A test of prompts would call
one of them better. So a claim about recipes needs several runs of each, and each run counts once.

Five runs a side are the fewest at which an exact test has room: 252 assignments of ten runs to two recipes,
so the smallest p-value is 2 / 252 = 0.8 %. With three a side it is 10 %. The permutation test holds its level
for every distribution of the metric if the recipes are equal: at most 12 / 252 = 4.8 % of the assignments
have a p-value of at most 5 %. Welch's t test holds it for normal metrics only. Its interval says by how much.
As in ``comparison``, the p-value is the larger of the two, and the interval is extended to 0 above 5 %.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import permutation_test, ttest_ind

from finetune.evaluation.calibration import FloatArray
from finetune.evaluation.comparison import Difference
from finetune.recipe.errors import Problem, UserError

MIN_SEEDS = 5
SEED_TEST = "permutation of the runs"


def standard_error(before: FloatArray, after: FloatArray, axis: int = -1) -> FloatArray:
    """Return the standard error of the difference of two means, with a variance of each (Welch 1938)."""
    variances = (np.var(runs, axis=axis, ddof=1) / runs.shape[axis] for runs in (before, after))
    return np.asarray(np.sqrt(sum(variances)))


def welch_t(before: FloatArray, after: FloatArray, axis: int = -1) -> FloatArray:
    """Return Welch's t, 0 where the means are equal."""
    difference = np.mean(after, axis=axis) - np.mean(before, axis=axis)
    # If the runs of each recipe are equal, the standard error is 0, or rounding.
    rounding = 1e-12 * np.maximum(np.abs(before).max(axis=axis), np.abs(after).max(axis=axis))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = difference / np.maximum(standard_error(before, after, axis), rounding)
    return np.where(difference == 0, 0.0, t)


def compare_recipes(
    before: Sequence[float],
    after: Sequence[float],
    *,
    metric: str,
    better: Literal["higher", "lower"] = "higher",
    percent: bool = True,
    seed: int = 0,
) -> Difference:
    """Return the difference of two recipes from a metric of several runs of each, with different seeds.

    Args:
        before: the metric of each run of the first recipe.
        after: of each run of the second one.
        metric: its name.
        better: in which direction a model improves.
        percent: whether it is a proportion.
        seed: of random permutations; up to nine runs a side there are none.

    Raises:
        UserError: there are fewer than five runs of a recipe.
    """
    fewest = min(len(before), len(after))
    if fewest < MIN_SEEDS:
        expected = f"at least {MIN_SEEDS} of each, with different seeds"
        repair = "train more with train.seed=1, train.seed=2 and so on"
        raise UserError(Problem("runs", f"{fewest} of one recipe", expected, repair))
    first, second = (np.asarray(values, dtype=np.float64) for values in (before, after))
    permuted = permutation_test(
        (first, second),
        welch_t,
        n_resamples=99_999,
        vectorized=True,
        axis=-1,
        rng=np.random.default_rng(seed),
    )
    value = float(second.mean() - first.mean())
    low, high, p_value = value, value, float(permuted.pvalue)
    # Welch's test is undefined if the runs of each recipe are equal.
    if np.ptp(first) or np.ptp(second):
        welch = ttest_ind(second, first, equal_var=False)
        low, high = map(float, welch.confidence_interval(0.95))
        p_value = max(p_value, float(welch.pvalue))
    if p_value > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(
        metric,
        value,
        low,
        high,
        p_value,
        SEED_TEST,
        count=len(first) + len(second),
        clusters=len(first) + len(second),
        changed=len(first) + len(second),
        std_error=float(standard_error(first, second)),
        better=better,
        percent=percent,
    )
