"""Metric specs of a stage: curves of metrics.jsonl, before/after metrics of the summary, diagnostics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

When = Literal["before", "after"]
"""An evaluation is before training or after it."""
COMMON_CURVES = {"learning_rate": "learning rate", "grad_norm": "gradient norm"}


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """A stage's own part of the report: title -> table (header row first), title -> figure."""

    tables: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    figures: Mapping[str, "Figure"] = field(default_factory=dict)


def no_diagnostics(record: Mapping[str, Any]) -> Diagnostics:
    """Return no tables and figures."""
    return Diagnostics()


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """What a method measures: logged metrics, the summary's before/after metrics, and what checks expect.

    Attributes:
        curves: metric of metrics.jsonl -> title of its curve.
        summary: metric recorded as ``<name>_before`` and ``<name>_after`` -> (label, format).
        diagnostics: run.json -> the stage's own part of the report.
        main: the held-out metric whose record shows that an evaluation was done.
        first_last: training metrics that run.json records for the first step and the last ones.
        generates: whether the trained model writes text, for samples.jsonl and graders.
        allows_zero_gradients: whether a step may have zero gradients: completions of equal reward have no
            advantage.
    """

    curves: Mapping[str, str] = field(default_factory=dict)
    summary: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    diagnostics: Callable[[Mapping[str, Any]], Diagnostics] = no_diagnostics
    main: str = "loss"
    first_last: tuple[str, ...] = ("loss",)
    generates: bool = True
    allows_zero_gradients: bool = False

    def with_summary(self, summary: Mapping[str, tuple[str, str]]) -> "MetricSpec":
        """Return this spec with more metrics in the summary."""
        return replace(self, summary={**self.summary, **summary})

    def with_curves(self, curves: Mapping[str, str]) -> "MetricSpec":
        """Return this spec with more metrics in metrics.jsonl."""
        return replace(self, curves={**self.curves, **curves})

    @property
    def logged_keys(self) -> dict[str, str]:
        """Return every metric of metrics.jsonl with its curve's title."""
        return {**self.curves, **COMMON_CURVES}


SUPERVISED_METRICS = MetricSpec(
    curves={"loss": "training loss (nats per trained token)", "eval/loss": "held-out loss"},
    summary={
        "loss": ("training loss", ".3f"),
        "eval/loss": ("held-out loss", ".3f"),
        "eval/perplexity": ("held-out perplexity", ".1f"),
        "eval/exact_match": ("exact match", ".1%"),
    },
)
