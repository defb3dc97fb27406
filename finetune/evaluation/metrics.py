"""Metrics of a suite: functions of sums over its items, so that a bootstrap needs one matrix product.

The sums of a replicate are its items' weights times their values. ``totals[name]`` is the sum of a value over
the items that have it, ``totals["n:name"]`` the number of these items.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from finetune.evaluation.calibration import FloatArray
from finetune.evaluation.items import SCORE, ItemResult

Totals = Mapping[str, FloatArray]
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """A metric of a suite.

    Attributes:
        name: as in results, such as ``accuracy``.
        function: its value from sums over items; arrays of shape (R,), one entry per bootstrap replicate.
        better: in which direction a model improves; ``neither`` where the best value is in between.
        percent: whether it is a proportion, written in percent.
        best: the ideal value of a metric of direction ``neither``.
    """

    name: str
    function: Callable[[Totals], FloatArray]
    better: Better = "higher"
    percent: bool = True
    best: float | None = None


@dataclass(frozen=True)
class Mean:
    """The function of a metric that is a mean: of a value, over the items that have it."""

    value: str

    def __call__(self, totals: Totals) -> FloatArray:
        return totals[self.value] / totals[f"n:{self.value}"]


def mean_of(value: str) -> Mean:
    """Return the function of a metric that is the mean of a value over the items that have it."""
    return Mean(value)


ACCURACY = Metric("accuracy", mean_of(SCORE))
GRADE = Metric("score", mean_of(SCORE))


def value_matrix(results: Sequence[ItemResult], names: Sequence[str]) -> dict[str, FloatArray]:
    """Return value and presence of each name for each item, (N,) each: ``name`` and ``n:name``."""
    columns: dict[str, FloatArray] = {}
    for name in names:
        values = [result.values.get(name) for result in results]
        columns[name] = np.array([0.0 if value is None else value for value in values])
        columns[f"n:{name}"] = np.array([float(value is not None) for value in values])
    return columns


def value_names(results: Sequence[ItemResult]) -> list[str]:
    """Return the names of all values, in the order of their first appearance."""
    return list(dict.fromkeys(name for result in results for name in result.values))


def totals(results: Sequence[ItemResult], weights_RN: FloatArray | None = None) -> dict[str, FloatArray]:
    """Return the sums of all values, (R,) each.

    Args:
        results: N items.
        weights_RN: weight of each item in each replicate; None: one replicate in which all have weight 1.
    """
    weights_RN = np.ones((1, len(results))) if weights_RN is None else weights_RN
    columns = value_matrix(results, value_names(results))
    return {name: weights_RN @ column for name, column in columns.items()}


def metric_value(metric: Metric, results: Sequence[ItemResult]) -> float:
    """Return a metric of the items."""
    return float(metric.function(totals(results))[0])
