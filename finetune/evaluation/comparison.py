"""Whether a model differs from another on the same items: differences, tests, and one rule of decision.

The rule: a metric is better or worse if the p-value, corrected by Holm for the number of metrics, is at most
alpha. The p-value is the larger of the test's and the interval's own, so both must exclude 0:

* The test is exact if the two models are exchangeable on each cluster, with any number of clusters. The
  bootstrap is not: with few clusters, or few items that differ, it excludes 0 too often.
* The interval says by how much. Where the test does not exclude 0, the interval is extended to 0. A wider
  interval still covers the difference in at least 95 % of samples.

So a reader never sees a verdict that the interval next to it contradicts.

The test is of the metric itself. Wilcoxon's signed-rank test is of the differences' median, which may have
the other sign.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Literal

import numpy as np

from finetune.evaluation.calibration import FloatArray
from finetune.evaluation.intervals import (
    bootstrap_totals,
    bounds_of,
    cluster_sums,
    is_binary,
    metric_values,
    percentile_interval,
    percentile_p_value,
    used_values,
)
from finetune.evaluation.items import ItemResult
from finetune.evaluation.metrics import Mean, Metric
from finetune.evaluation.paired_tests import (
    MCNEMAR,
    bonett_price_interval,
    holm,
    mcnemar_p_value,
    swap_test,
)
from finetune.evaluation.small_samples import Z_95

Verdict = Literal["better", "worse", "not shown"]
Z_POWER = 0.8416212335729143
"""80 % quantile of the normal distribution: the power that sample sizes are planned for."""


@dataclass(frozen=True)
class Difference:
    """A metric of the second model minus that of the first one, on the same items.

    For a metric whose best value is in between, it is the difference of the distances from that value.

    Attributes:
        metric: the metric's name.
        value: the difference.
        low: lower end of its 95 % interval, which contains 0 if ``p_value`` is above 0.05.
        high: upper end.
        p_value: two-sided, not corrected for the number of metrics; at least the interval's own.
        test: name of the test.
        count: items, or training runs.
        clusters: independent clusters among them.
        changed: items whose values differ.
        std_error: of the difference.
        better: in which direction a model improves.
        percent: whether it is a difference of proportions.
    """

    metric: str
    value: float
    low: float
    high: float
    p_value: float
    test: str
    count: int
    clusters: int
    changed: int
    std_error: float
    better: Literal["higher", "lower"] = "higher"
    percent: bool = True


@dataclass(frozen=True)
class Decision:
    """What a difference shows.

    Attributes:
        difference: as compared.
        verdict: of the second model.
        p_value: corrected for the number of metrics.
        low: lower end of the difference's interval; the interval contains 0 if nothing is shown.
        high: upper end.
    """

    difference: Difference
    verdict: Verdict
    p_value: float
    low: float
    high: float


def compare(
    metric: Metric, before: Sequence[ItemResult], after: Sequence[ItemResult], seed: int = 0
) -> Difference | None:
    """Return the difference of two models on the same items, None if the metric is undefined for one.

    For scores of 0 and 1 of independent items: the exact McNemar test with the interval of Bonett and Price.
    Else: a permutation test that swaps the models on whole clusters, with a paired cluster bootstrap.

    Args:
        metric: the metric.
        before: results of the first model.
        after: results of the second one, in any order.
        seed: of bootstrap and permutations.

    Raises:
        ValueError: they are results of different items.
    """
    by_id = {result.id: result for result in after}
    if len(before) != len(after) or by_id.keys() != {result.id for result in before}:
        raise ValueError("results of different items cannot be compared")
    names = used_values(metric, [*before, *after])
    pairs = [
        (result, by_id[result.id])
        for result in before
        if any(name in result.values or name in by_id[result.id].values for name in names)
    ]
    if not pairs:
        return None
    clusters = list(dict.fromkeys(result.cluster for result, _ in pairs))
    changed = sum(any(a.values.get(name) != b.values.get(name) for name in names) for a, b in pairs)
    firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
    if (
        isinstance(metric.function, Mean)
        and metric.better != "neither"
        and len(clusters) == len(pairs)
        and is_binary(metric.function, [*firsts, *seconds])
    ):
        figures = _binary_figures(metric.function, firsts, seconds)
    else:
        sums = [cluster_sums(results, names, clusters) for results in (firsts, seconds)]
        figures = _general_figures(metric, sums[0], sums[1], seed)
    if np.isnan(figures.value):
        return None
    low, high = figures.interval
    if figures.p_value > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(
        metric.name,
        figures.value,
        low,
        high,
        figures.p_value,
        figures.test,
        len(pairs),
        len(clusters),
        changed,
        figures.std_error,
        better="lower" if metric.better == "neither" else metric.better,
        percent=metric.percent,
    )


@dataclass(frozen=True)
class _Figures:
    value: float
    interval: tuple[float, float]
    p_value: float
    test: str
    std_error: float


def _binary_figures(mean: Mean, before: Sequence[ItemResult], after: Sequence[ItemResult]) -> _Figures:
    scores = [(a.values[mean.value], b.values[mean.value]) for a, b in zip(before, after, strict=True)]
    improved, regressed = scores.count((0, 1)), scores.count((1, 0))
    low, high = bonett_price_interval(improved, regressed, len(scores))
    value = (improved - regressed) / len(scores)
    return _Figures(
        value, (low, high), mcnemar_p_value(improved, regressed), MCNEMAR, (high - low) / (2 * Z_95)
    )


def _general_figures(
    metric: Metric, before: Mapping[str, FloatArray], after: Mapping[str, FloatArray], seed: int
) -> _Figures:
    """Return the figures of a metric from its values' sums in each cluster, (G,) each."""
    before_GV, after_GV = (np.stack(list(sums.values()), axis=1) for sums in (before, after))

    def difference(before_PV: FloatArray, after_PV: FloatArray) -> FloatArray:
        first, second = (dict(zip(before, totals_PV.T, strict=True)) for totals_PV in (before_PV, after_PV))
        return _objective(metric, second) - _objective(metric, first)

    value = float(difference(before_GV.sum(axis=0, keepdims=True), after_GV.sum(axis=0, keepdims=True))[0])
    if np.isnan(value):
        return _Figures(value, (value, value), value, "", value)
    totals_RV = bootstrap_totals(np.hstack([before_GV, after_GV]), seed)
    replicates = difference(*np.hsplit(totals_RV, 2))
    clusters = len(before_GV)
    lowest, highest = bounds_of(metric)
    bounds = (lowest - highest, highest - lowest)
    interval = percentile_interval(replicates, value, clusters, bounds=bounds)
    p_value, test = swap_test(difference, before_GV, after_GV, seed)
    p_value = max(p_value, percentile_p_value(replicates, clusters, interval))
    return _Figures(value, interval, p_value, test, float(np.nanstd(replicates)))


def _objective(metric: Metric, sums: Mapping[str, FloatArray]) -> FloatArray:
    """Return what is compared: the metric, or its distance from the best value."""
    values = metric_values(metric, sums)
    if metric.better != "neither":
        return values
    assert metric.best is not None, f"{metric.name}: a metric of direction neither has a best value"
    return np.abs(values - metric.best)


def decide(differences: Sequence[Difference], alpha: float = 0.05) -> list[Decision]:
    """Return what each difference shows; at most ``alpha`` of such families have a wrong verdict.

    Args:
        differences: all that are judged together, such as the headlines of all suites.
        alpha: probability that any of them is called better or worse although it is equal; at most 0.05, the
            level of the intervals.
    """
    assert alpha <= 0.05, "a verdict at this level could contradict its 95 % interval"
    decisions = []
    for difference, p_value in zip(differences, holm([entry.p_value for entry in differences]), strict=True):
        low, high = difference.low, difference.high
        if p_value > alpha:
            verdict: Verdict = "not shown"
            low, high = min(low, 0.0), max(high, 0.0)
        else:
            verdict = "better" if (difference.value > 0) == (difference.better == "higher") else "worse"
        decisions.append(Decision(difference, verdict, p_value, low, high))
    return decisions


def more_items_needed(difference: Difference) -> int | None:
    """Return about how many more items would show a difference as large as the observed one.

    The number at which a 5 % test has a power of 80 % is ``(1.96 + 0.84)^2 / value^2`` times the variance of
    one item. It is rounded up to two digits, and None if nothing differs. The true difference may be smaller
    than the observed one: then more items are needed.
    """
    if difference.value == 0:
        return None
    ratio = ((Z_95 + Z_POWER) * difference.std_error / difference.value) ** 2
    more = difference.count * (ratio - 1)
    if more <= 0:
        return 0
    unit = 10.0 ** max(0, floor(log10(more)) - 1)
    return int(ceil(more / unit) * unit)
