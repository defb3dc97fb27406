"""Changes of a model's results between two evaluations, suite by suite, with corrected decisions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any

from finetune.evaluation.comparison import Decision, Difference, compare, decide
from finetune.evaluation.comparison import Verdict as Shown
from finetune.evaluation.figures import format_value
from finetune.evaluation.items import SCORE, ItemResult
from finetune.evaluation.metrics import Metric
from finetune.evaluation.results import Estimate, Evaluation, SuiteResult
from finetune.evaluation.sequential import Look
from finetune.evaluation.suites import metrics_of

PURPOSES = ("task", "retention", "safety")
MINUS = "\u2212"
EVEN = 0.5
"""Win rate of two models that a judge prefers equally often."""
NEGLIGIBLE = 0.01
"""Part of a figure such as bits per byte below which a change is no loss: tests show even less."""
TONES = {"better": "good", "worse": "bad", "not shown": "unsure"}
TURNED: Mapping[Shown, Shown] = {"better": "worse", "worse": "better", "not shown": "not shown"}
NO_DIRECTION = "neither a higher nor a lower value is better"
MOST_DESCRIBED = 2
"""Suites of one status that a sentence gives numbers for."""
SEQUENTIAL_TEST = "betting confidence sequence"
OTHER_ITEMS = "the items or the settings of the suite differ"


@dataclass(frozen=True)
class SuiteChange:
    """How a model's result on a suite differs from that of another one.

    Attributes:
        suite: name of the suite.
        purpose: what the verdict uses it for: task, retention or safety.
        metric: name of the headline.
        after: result of the model.
        before: result of the other model; None for a preference against it, whose even score is 50 %.
        decision: what the difference shows; None if the results cannot be compared.
        reason: why they cannot, or "".
    """

    suite: str
    purpose: str
    metric: str
    after: Estimate
    before: Estimate | None = None
    decision: Decision | None = None
    reason: str = ""

    @property
    def status(self) -> str:
        """Return ``better``, ``worse``, ``not shown``, or "" if the results cannot be compared."""
        return self.decision.verdict if self.decision else ""

    @property
    def possible_loss(self) -> float:
        """Return the largest loss in the interval, 0 if it has none."""
        assert self.decision is not None
        is_higher = self.decision.difference.better == "higher"
        return max(0.0, -self.decision.low if is_higher else self.decision.high)

    @property
    def relative_loss(self) -> float:
        """Return the largest loss in the interval: of a proportion as it is, else as a part of the figure."""
        if self.after.percent or self.before is None or not self.before.value:
            return self.possible_loss
        return self.possible_loss / abs(self.before.value)

    @property
    def unit(self) -> str:
        """Return the unit of a difference."""
        return "points" if self.after.percent else self.metric

    @property
    def is_loss(self) -> bool:
        """Return whether something is lost: worse, by more than a negligible part of bits per byte."""
        if self.status != "worse" or self.decision is None:
            return False
        if self.after.percent or self.before is None:
            return True
        return abs(self.decision.difference.value) >= NEGLIGIBLE * abs(self.before.value)

    def amount(self, value: float) -> str:
        """Return the size of a difference with its unit."""
        if not isfinite(value):
            return "an unknown amount"
        return f"{100 * abs(value):.1f} points" if self.after.percent else f"{abs(value):.3f} {self.metric}"

    def turned(self) -> "SuiteChange":
        """Return the change in the other direction, from this model to the other one."""
        assert self.before is not None and self.decision is not None
        old = self.decision
        value = replace(old.difference, value=-old.difference.value, low=-old.high, high=-old.low)
        turned = Decision(value, TURNED[old.verdict], old.p_value, -old.high, -old.low)
        return replace(self, before=self.after, after=self.before, decision=turned)

    @property
    def values_text(self) -> str:
        """Return both results."""
        after = format_value(self.after.value, percent=self.after.percent)
        if self.before is None:
            return after
        return f"{format_value(self.before.value, percent=self.before.percent)} → {after}"

    @property
    def difference_text(self) -> str:
        """Return the difference with its sign and unit."""
        assert self.decision is not None
        points = " points" if self.after.percent else ""
        return f"{_signed(self.decision.difference.value, percent=self.after.percent)}{points}"

    @property
    def interval_text(self) -> str:
        """Return the ends of the difference's interval."""
        assert self.decision is not None
        ends = (self.decision.low, self.decision.high)
        return " to ".join(_signed(end, percent=self.after.percent) for end in ends)

    def describe(self, label: str = "95 % interval ") -> str:
        """Return suite, difference and interval in one phrase, to follow ``better at`` or ``worse at``.

        Args:
            label: what the interval is called; "" after the first one of a sentence.
        """
        assert self.decision is not None
        if self.status == "not shown":
            return f"{self.suite} ({self.difference_text}, {label}{self.interval_text})"
        ends = sorted((abs(self.decision.low), abs(self.decision.high)))
        sizes = " to ".join(f"{100 * end:.1f}" if self.after.percent else f"{end:.3f}" for end in ends)
        return f"{self.suite} by {self.amount(self.decision.difference.value)} ({label}{sizes})"

    def record(self, scale: float) -> dict[str, Any]:
        """Return the change as JSON values, with the texts of the table.

        Args:
            scale: difference at the ends of its bar.
        """
        record: dict[str, Any] = {
            "suite": self.suite,
            "purpose": self.purpose,
            "metric": self.metric,
            "status": self.status,
            "tone": TONES.get(self.status, ""),
            "reason": self.reason,
            "before": estimate_record(self.before),
            "after": estimate_record(self.after),
        }
        if self.decision is None:
            return record
        difference = self.decision.difference
        sign = 1 if difference.better == "higher" else -1
        ends = sorted((sign * self.decision.low, sign * self.decision.high))
        positions = zip(("low", "point", "high"), (ends[0], sign * difference.value, ends[1]), strict=True)
        return record | {
            "difference": difference.value,
            "low": finite(self.decision.low),
            "high": finite(self.decision.high),
            "p_value": finite(self.decision.p_value),
            "test": difference.test,
            "num_items": difference.count,
            "num_clusters": difference.clusters,
            "num_changed": difference.changed,
            "values_text": self.values_text,
            "difference_text": self.difference_text,
            "interval_text": self.interval_text,
            # Better is to the right, whatever the metric's direction; a bar has a width of 100.
            "bar": {name: _position(value, scale) for name, value in positions},
        }


def suite_changes(
    before: Evaluation, after: Evaluation, looks: Mapping[str, Look] | None = None
) -> tuple[list[SuiteChange], list[str]]:
    """Return the change on each suite that both evaluations have, and the other suites' names.

    Args:
        before: results of the other model.
        after: results of the model.
        looks: last look at each suite that a sequential comparison has stopped; its interval, valid at every
            look and already corrected, decides. A test of a fixed number of items would not be valid.
    """
    changes: list[SuiteChange] = []
    differences: list[tuple[int, Difference]] = []
    only_one = [name for name in before.suites if name not in after.suites]
    for name, result in after.suites.items():
        other = before.suites.get(name)
        if other is None and result.settings["task"] != "preference":
            only_one.append(name)
            continue
        change, difference = _change(result, other)
        if difference is not None and looks is not None and name in looks:
            change = replace(change, decision=_sequential_decision(difference, looks[name]))
        elif difference is not None:
            differences.append((len(changes), difference))
        changes.append(change)
    indices = [index for index, _ in differences]
    decided_changes = decided(
        [changes[index] for index in indices], [difference for _, difference in differences]
    )
    for index, change in zip(indices, decided_changes, strict=True):
        changes[index] = change
    return sorted(changes, key=lambda change: PURPOSES.index(change.purpose)), only_one


def _sequential_decision(difference: Difference, look: Look) -> Decision:
    seen = replace(
        difference, value=look.value, low=look.low, high=look.high, p_value=nan, test=SEQUENTIAL_TEST
    )
    improved = (look.value > 0) == (difference.better == "higher")
    shown: Shown = ("better" if improved else "worse") if look.decided else "not shown"
    return Decision(seen, shown, nan, look.low, look.high)


def decided(changes: Sequence[SuiteChange], differences: Sequence[Difference]) -> list[SuiteChange]:
    """Return changes with their decisions, corrected (Holm) for their number.

    Those of the task are one family, those of retention and safety another: further suites of retention cost
    the task no power.

    Args:
        changes: without decisions.
        differences: of each.
    """
    decided_changes = list(changes)
    for is_task in (True, False):
        family = [index for index, change in enumerate(changes) if (change.purpose == "task") == is_task]
        decisions = decide([differences[index] for index in family])
        for index, decision in zip(family, decisions, strict=True):
            decided_changes[index] = replace(changes[index], decision=decision)
    return decided_changes


def _change(result: SuiteResult, other: SuiteResult | None) -> tuple[SuiteChange, Difference | None]:
    estimate, metric = result.headline[1], metrics_of(result.settings)[0]
    change = SuiteChange(
        result.suite, str(result.settings["purpose"]), metric_label(result, metric), estimate
    )
    if not has_direction(metric):
        return replace(change, reason=NO_DIRECTION), None
    if other is None:
        difference = compare(metric, [_even(item) for item in result.items], result.items)
    elif other.fingerprint != result.fingerprint:
        return replace(change, reason=OTHER_ITEMS), None
    else:
        change = replace(change, before=other.headline[1])
        difference = compare(metric, other.items, result.items)
    if difference is None:
        return replace(change, reason=f"{change.metric} is undefined"), None
    return change, difference


def has_direction(metric: Metric) -> bool:
    """Return whether one value of a metric is better than another one, such as a lower bias score."""
    return metric.better != "neither" or metric.best is not None


def metric_label(result: SuiteResult, metric: Metric) -> str:
    """Return the name of a suite's headline; its differences may be of the distance from the best value."""
    name = result.headline[0]
    if metric.better != "neither" or metric.best is None:
        return name
    return f"{name}, distance from {format_value(metric.best, percent=metric.percent)}"


def _even(item: ItemResult) -> ItemResult:
    return replace(item, values={SCORE: EVEN} if item.score is not None else {})


def describe_all(changes: Sequence[SuiteChange], *, is_first: bool = True) -> str:
    """Return the phrases of changes as a list in words; from the third on, suites are only named.

    Args:
        changes: at least one.
        is_first: whether the first phrase also says what the numbers in parentheses are.
    """
    described = changes[:MOST_DESCRIBED]
    phrases = [
        change.describe() if is_first and number == 0 else change.describe("")
        for number, change in enumerate(described)
    ]
    phrases += [change.suite for change in changes[MOST_DESCRIBED:]]
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def bar_scales(changes: Sequence[SuiteChange]) -> Mapping[str, float]:
    """Return the largest absolute end of an interval, by unit: bars of one unit have one scale."""
    scales: dict[str, float] = {}
    for change in changes:
        if change.decision is not None:
            values = (change.decision.low, change.decision.high, change.decision.difference.value)
            known = [abs(value) for value in values if isfinite(value)]
            scales[change.unit] = max(scales.get(change.unit, 1e-9), *known)
    return scales


def _signed(value: float, *, percent: bool) -> str:
    if not isfinite(value):
        return "unknown"
    text = f"{100 * value:+z.1f}" if percent else f"{value:+z.3f}"
    # An end at 0 has no sign.
    return text.replace("-", MINUS) if float(text) else text.removeprefix("+")


def estimate_record(estimate: Estimate | None) -> dict[str, Any] | None:
    """Return an estimate as JSON values: an unknown end of an interval is null."""
    if estimate is None:
        return None
    ends = {"low": finite(estimate.low), "high": finite(estimate.high)}
    return {"value": estimate.value, **ends, "count": estimate.count, "clusters": estimate.clusters}


def finite(value: float) -> float | None:
    """Return a number, None for an infinite one, which JSON does not have."""
    return value if isfinite(value) else None


def _position(value: float, scale: float) -> float:
    # An interval without an end extends to the bar's own.
    return round(50 + 47 * max(-1.0, min(1.0, value / scale)), 2)
