"""Recipes are compared by runs: an exact test by hand, its error rate for skewed metrics, enough runs."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import ttest_ind

from finetune.evaluation.comparison import decide
from finetune.evaluation.seed_comparison import compare_recipes
from finetune.recipe.errors import UserError


def test_the_permutation_test_by_all_assignments() -> None:
    before, after = [0.61, 0.64, 0.60, 0.66, 0.63], [0.65, 0.70, 0.67, 0.71, 0.69]
    change = compare_recipes(before, after, metric="accuracy")
    runs = before + after
    # With as many runs a side, Welch's t orders the assignments as the difference of the sums does.
    sums = [abs(2 * sum(runs[n] for n in chosen) - sum(runs)) for chosen in combinations(range(10), 5)]
    observed = abs(sum(after) - sum(before))
    exact = np.mean([value >= observed - 1e-9 for value in sums])
    welch = ttest_ind(after, before, equal_var=False)
    assert change.value == pytest.approx(0.056)
    assert change.p_value == pytest.approx(max(exact, welch.pvalue), rel=1e-6)
    assert (change.low, change.high) == pytest.approx(tuple(welch.confidence_interval(0.95)))
    assert decide([change])[0].verdict == "better" and change.std_error == pytest.approx(
        change.value / welch.statistic
    )


def test_complete_separation_is_the_smallest_p_value() -> None:
    change = compare_recipes([2.0] * 5, [1.0] * 5, metric="loss", better="lower", percent=False)
    assert change.p_value == pytest.approx(2 / 252) and decide([change])[0].verdict == "better"
    equal = compare_recipes([1.0] * 5, [1.0] * 5, metric="loss")
    assert equal.p_value == 1 and decide([equal])[0].verdict == "not shown"


def test_the_error_rate_holds_for_a_metric_that_is_not_normal() -> None:
    """One run of ten fails, so that its metric is far from the others'."""
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        runs = np.where(generator.uniform(size=10) < 0.1, 0.2, 0.9) + 0.02 * generator.normal(size=10)
        change = compare_recipes(runs[:5], runs[5:], metric="accuracy")
        excludes_zero = change.low > 0 or change.high < 0
        assert excludes_zero == (change.p_value <= 0.05)
        wrong += excludes_zero
    # At most 4.8 % of 400 are expected: 19, and 31 with a probability of 0.5 %.
    assert wrong <= 31


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UserError, match="at least 5 of each"):
        compare_recipes([0.5] * 4, [0.6] * 9, metric="accuracy")
