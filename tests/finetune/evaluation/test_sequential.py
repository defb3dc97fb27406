"""The sequential comparison: equal to its equations, an error rate below alpha, and its savings."""

from math import log

import numpy as np
import pytest

from finetune.evaluation.items import ItemResult
from finetune.evaluation.sequential import (
    SequentialComparison,
    betting_interval,
    cluster_differences,
    log_capital,
    random_order,
)


def test_the_capital_is_the_product_of_the_bets() -> None:
    values, mean = [0.2, 0.9, 0.5, 1.0, 0.9], 0.4
    capital = 0.0
    for d in range(1, 21):
        product = 1.0
        for value in values:
            product *= 1 + d / 21 * (value - mean) / mean
        capital += product / 20
    distinct, counts = np.array([0.2, 0.5, 0.9, 1.0]), np.array([1, 1, 2, 1])
    assert log_capital(distinct, counts, mean) == pytest.approx(log(capital), rel=1e-12)


def test_the_interval_ends_where_the_capital_reaches_the_threshold() -> None:
    values = np.random.default_rng(0).beta(2, 3, 200)
    low, high = betting_interval(values, 0.05)
    once = np.ones(200)
    assert log_capital(values, once, low) == pytest.approx(log(40), abs=1e-6)
    assert log_capital(1 - values, once, 1 - high) == pytest.approx(log(40), abs=1e-6)
    assert low < 0.4 < high and high - low < 0.15
    assert betting_interval(np.zeros(0), 0.05) == (0, 1)


def test_equal_models_are_rarely_decided_at_any_look() -> None:
    """400 comparisons of 300 items with a look at every 5th: a test at 5 % each would be wrong in 30 %."""
    generator = np.random.default_rng(1)
    differences = generator.choice([-1.0, 0.0, 1.0], p=[0.15, 0.7, 0.15], size=(400, 300))
    wrong = naive = 0
    for row in differences:
        looks = range(5, 301, 5)
        wrong += any(
            max(log_capital(values, counts, 0.5), log_capital(1 - values, counts, 0.5)) >= log(40)
            for values, counts in (np.unique((row[:count] + 1) / 2, return_counts=True) for count in looks)
        )
        z = np.cumsum(row) / np.sqrt(np.maximum(np.cumsum(row**2), 1)) * (np.arange(300) >= 19)
        naive += bool(np.any(np.abs(z[4::5]) > 1.96))
    assert 0 < wrong <= 20 and naive > 80


def test_a_large_difference_is_decided_early() -> None:
    """At twice the difference that 400 items show with 80 % power, at most 60 % of the items are used."""
    generator = np.random.default_rng(2)
    # 400 items of which 25 % differ: 2.8 sqrt(0.25 / 400) = 0.07.
    difference, differing = 0.14, 0.25
    probabilities = [(differing - difference) / 2, 1 - differing, (differing + difference) / 2]
    used = []
    for _ in range(60):
        comparison = SequentialComparison()
        items = generator.choice([-1.0, 0.0, 1.0], p=probabilities, size=400)
        for start in range(0, 400, 20):
            if comparison.update(items[start : start + 20]).decided:
                break
        used.append(comparison.looks[-1].count)
        low, high = comparison.interval
        assert comparison.decided == (low > 0 or high < 0) and low <= comparison.looks[-1].value <= high
    assert np.mean(used) < 0.6 * 400


def test_bounds_scale_the_interval() -> None:
    values = np.random.default_rng(3).uniform(size=100)
    comparison = SequentialComparison(low=-2, high=4)
    look = comparison.update(values * 6 - 2)
    low, high = betting_interval(values, 0.05)
    assert (look.low, look.high) == pytest.approx((low * 6 - 2, high * 6 - 2))
    assert look.value == pytest.approx(values.mean() * 6 - 2) and comparison.interval == (look.low, look.high)
    with pytest.raises(ValueError, match="between -2 and 4"):
        comparison.update([4.5])
    assert not SequentialComparison().decided and SequentialComparison().interval == (-1, 1)


def test_a_cluster_is_one_difference() -> None:
    def results(scores) -> list[ItemResult]:
        return [
            ItemResult(str(n), cluster, "", {} if score is None else {"score": score}, {})
            for n, (cluster, score) in enumerate(zip("aabbc", scores, strict=True))
        ]

    differences = cluster_differences(results([0, 1, 0, 1, None]), results([1, 1, 0, None, 1])[::-1])
    assert differences == {"a": 0.5, "b": 0.0}
    order = random_order(["a", "a", "b", "c", "b"], seed=3)
    assert sorted(order) == ["a", "b", "c"] and order == random_order(["a", "b", "c"], seed=3)
    assert {tuple(random_order(["a", "b", "c"], seed)) for seed in range(30)} > {("c", "a", "b")}
