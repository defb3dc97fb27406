"""Intervals cover the true value, widen with clusters, and are never empty where nothing varies."""

from math import inf, isnan

import numpy as np
import pytest
from scipy.stats import bootstrap

from finetune.evaluation import intervals
from finetune.evaluation.intervals import estimate, suite_estimates
from finetune.evaluation.items import ItemResult
from finetune.evaluation.metrics import ACCURACY, Metric, mean_of

LOSS = Metric("loss", mean_of("loss"), better="lower", percent=False)
RATIO = Metric("per byte", lambda totals: totals["logp"] / totals["bytes"], percent=False)


def results(scores, *, clusters=None, name="score", groups=None) -> list[ItemResult]:
    return [
        ItemResult(
            str(n),
            str(n if clusters is None else clusters[n]),
            groups[n] if groups else "",
            {} if score is None else {name: float(score)},
            {},
        )
        for n, score in enumerate(scores)
    ]


def test_a_proportion_of_independent_items_has_wilson_s_interval() -> None:
    figure = estimate(ACCURACY, results([1] * 5 + [0] * 5))
    # Agresti and Coull 1998: 5 of 10.
    assert (figure.value, figure.count, figure.clusters, figure.percent) == (0.5, 10, 10, True)
    assert (figure.low, figure.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_the_bootstrap_of_independent_items_is_scipy_s() -> None:
    generator = np.random.default_rng(1)
    logps, lengths = generator.normal(-50, 20, 300), generator.integers(20, 60, 300)
    items = [
        ItemResult(str(n), str(n), "", {"logp": logp, "bytes": float(length)}, {})
        for n, (logp, length) in enumerate(zip(logps, lengths, strict=True))
    ]
    figure = estimate(RATIO, items)
    reference = bootstrap(
        (logps, lengths),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    )
    # Ends of 2,000 replicates vary by 6 % of a standard error between seeds; three times that.
    tolerance = 0.18 * reference.standard_error
    assert figure.low == pytest.approx(reference.confidence_interval.low, abs=tolerance)
    assert figure.high == pytest.approx(reference.confidence_interval.high, abs=tolerance)


def test_repeated_items_say_no_more_than_one_of_each() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(2, size=60)
    once = estimate(ACCURACY, results(scores))
    repeated = estimate(
        ACCURACY, results(np.repeat(scores, 5), clusters=np.repeat(np.arange(60), 5), groups=None)
    )
    assert (repeated.count, repeated.clusters) == (300, 60)
    # Wilson's interval and the bootstrap's differ by terms of order 1/60.
    assert repeated.high - repeated.low == pytest.approx(once.high - once.low, rel=0.1)


@pytest.mark.parametrize(("score", "low", "high"), [(1, 0.8389, 1), (0, 0, 0.1611)])
def test_clusters_without_a_difference_have_wilson_s_interval(score, low, high) -> None:
    figure = estimate(ACCURACY, results([score] * 40, clusters=np.repeat(np.arange(20), 2)))
    # Wilson 20 of 20: the other end is 20 / (20 + 1.96^2).
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=1e-4)


def test_one_text_says_nothing_about_others() -> None:
    figure = estimate(LOSS, results([2.5], name="loss"))
    assert (figure.value, figure.low, figure.high) == (2.5, -inf, inf)


def test_items_without_the_value_do_not_count() -> None:
    figure = estimate(ACCURACY, results([1, None, 0, 1]))
    assert (figure.count, figure.clusters) == (3, 3) and figure.value == pytest.approx(2 / 3)
    undefined = estimate(LOSS, results([1, 0]))
    assert isnan(undefined.value) and undefined.count == 0


def test_a_suite_has_estimates_of_its_metrics_and_groups() -> None:
    items = results([1, 1, 0, 0, 1, None], groups=["law", "law", "law", "art", "art", "empty"])
    metrics, groups = suite_estimates([ACCURACY, LOSS], items)
    assert list(metrics) == ["accuracy"] and metrics["accuracy"].value == 0.6
    assert {name: (figure.value, figure.count) for name, figure in groups.items()} == {
        "law": (pytest.approx(2 / 3), 3),
        "art": (0.5, 2),
    }
    assert suite_estimates([ACCURACY], results([1, 0]))[1] == {}


@pytest.mark.parametrize(("clusters", "size"), [(12, 4), (40, 4)])
def test_the_cluster_bootstrap_covers_the_true_mean(clusters, size, monkeypatch) -> None:
    """Ignoring the clusters, an interval would cover the mean in 71 % of samples only."""
    monkeypatch.setattr(intervals, "REPLICATES", 400)
    generator = np.random.default_rng(clusters)
    covered = 0
    for seed in range(400):
        shared = generator.normal(size=(clusters, 1))
        values = 3 + shared + 0.5 * generator.normal(size=(clusters, size))
        figure = estimate(
            LOSS,
            results(values.ravel(), clusters=np.repeat(np.arange(clusters), size), name="loss"),
            seed=seed,
        )
        covered += figure.low <= 3 <= figure.high
    # 95 % with a standard error of 1.1 %.
    assert 0.92 <= covered / 400 <= 0.98
