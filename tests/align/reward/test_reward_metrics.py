"""What is measured of scores, by hand: who is better, how sure that is, and how much of it is length."""

from math import exp, log

import numpy as np
import pytest

from align.reward.metrics import (
    ScoredComparisons,
    calibration,
    comparison_metrics,
    histogram,
    pair_comparisons,
    spearman,
)
from finetune.evaluation.small_samples import wilson_interval


def scored(rewards: list[float], ranks: list[int], lengths: list[int], sizes: list[int]) -> ScoredComparisons:
    return ScoredComparisons(
        np.asarray(rewards, dtype=np.float64),
        np.asarray(ranks, dtype=np.int32),
        np.asarray(lengths),
        np.asarray(sizes),
    )


def test_each_comparison_has_weight_one() -> None:
    some = scored([1, 0, 2, 1, 0, 0, 1], [0, 1, 0, 1, 2, 0, 1], [1, 2, 3, 4, 5, 6, 6], [2, 3, 2])
    metrics = comparison_metrics(some)
    assert metrics["comparisons"] == 3 and metrics["pairs"] == 5
    assert metrics["accuracy"] == pytest.approx(2 / 3), "two lists are right, one is wrong"
    assert metrics["margin"] == pytest.approx((1 + (1 + 2 + 1) / 3 - 1) / 3)
    assert metrics["longer_is_better"] == pytest.approx((0 + 0 + 0.5) / 3)
    only = comparison_metrics(some.select(np.asarray([False, True, False])))
    assert only["comparisons"] == 1 and only["accuracy"] == 1.0


def test_ties_are_ignored_and_equal_rewards_count_half() -> None:
    pairs = pair_comparisons(scored([5, 5, 5], [0, 0, 2], [1, 1, 1], [3]))
    assert len(pairs.margins) == 2 and pairs.weights.tolist() == [0.5, 0.5]
    assert pairs.positive_fraction(pairs.margins) == 0.5
    metrics = comparison_metrics(scored([0, 0], [0, 1], [3, 3], [2]))
    assert metrics["loss"] == pytest.approx(log(2)) and metrics["correlation_with_length"] is None


def test_wilson_interval_matches_published_values_and_stays_within_0_and_1() -> None:
    low, high = wilson_interval(0.5, 10)  # Agresti and Coull 1998: (0.237, 0.763)
    assert (round(low, 3), round(high, 3)) == (0.237, 0.763)
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0) and wilson_interval(1.0, 10)[0] == pytest.approx(
        10 / (10 + 1.959964**2)
    )
    assert wilson_interval(0.0, 10)[0] == pytest.approx(0.0, abs=1e-12)


def test_a_calibrated_model_has_no_calibration_error() -> None:
    lead = log(3)  # it says 3/4
    error, curve = calibration(np.asarray([lead] * 3 + [-lead]), np.ones(4))
    assert error == pytest.approx(0.0, abs=1e-12)
    assert curve == [{"confidence": pytest.approx(0.75), "accuracy": 0.75, "fraction": 1.0}]
    sure, _ = calibration(np.asarray([10.0, -10.0]), np.ones(2))
    assert sure == pytest.approx(1 / (1 + exp(-10)) - 0.5)


def test_calibration_uses_the_weights() -> None:
    error, curve = calibration(np.asarray([0.0, 5.0]), np.asarray([3.0, 1.0]))
    assert [point["fraction"] for point in curve] == [0.75, 0.25]
    assert error == pytest.approx(0.25 * (1 - 1 / (1 + exp(-5))))


def test_spearman_uses_ranks_only() -> None:
    assert spearman(np.asarray([1.0, 2.0, 3.0]), np.asarray([1, 10, 1000])) == pytest.approx(1.0)
    assert spearman(np.asarray([1.0, 2.0, 3.0]), np.asarray([9, 8, -7])) == pytest.approx(-1.0)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert spearman(np.asarray([0.0, 1.0, 1.0, 2.0]), np.arange(4)) == pytest.approx(0.9**0.5)
    assert spearman(np.zeros(3), np.arange(3)) is None


def test_the_histogram_has_common_bin_edges() -> None:
    counts = histogram(np.asarray([0.0, 1.0, 1.0]), np.asarray([-1.0, 0.5]))
    assert sum(counts["chosen"]) == 3 and sum(counts["rejected"]) == 2
    assert counts["bin_edges"][0] == -1.0 and counts["bin_edges"][-1] == 1.0
    assert len(counts["bin_edges"]) == len(counts["chosen"]) + 1
