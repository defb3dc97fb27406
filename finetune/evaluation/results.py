"""Results of suites, and the file in which an evaluation keeps them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.evaluation.items import ItemResult


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: of all items.
        low: lower end of the interval.
        high: upper end.
        count: items that it was computed from.
        clusters: independent clusters among them.
        percent: whether it is a proportion.
    """

    value: float
    low: float
    high: float
    count: int
    clusters: int
    percent: bool = True


@dataclass(frozen=True)
class SuiteResult:
    """A model's results on a suite.

    Attributes:
        suite: name of the suite.
        settings: the suite's settings as plain values; ``suites.metrics_of`` returns its metrics.
        fingerprint: digest of items and settings: equal ones can be compared item by item.
        items: results of the items.
        metrics: by name, the headline first.
        groups: the headline of each group of items, {} without groups.
        seconds: of the computation; answers from the cache cost none.
        notes: lines on what was found, such as contamination.
    """

    suite: str
    settings: Mapping[str, Any]
    fingerprint: str
    items: Sequence[ItemResult]
    metrics: Mapping[str, Estimate]
    groups: Mapping[str, Estimate] = field(default_factory=dict)
    seconds: float = 0.0
    notes: Sequence[str] = ()

    @property
    def headline(self) -> tuple[str, Estimate]:
        """Return name and estimate of the first metric."""
        return next(iter(self.metrics.items()))


@dataclass(frozen=True)
class Evaluation:
    """A model's results on several suites.

    Attributes:
        model: the name for people: of a run, a base, a folder or an endpoint's model.
        identity: what identifies the weights and the template.
        suites: by name.
    """

    model: str
    identity: Mapping[str, Any]
    suites: Mapping[str, SuiteResult]
