"""Metric specs of a stage: curves of metrics.jsonl, before/after metrics of the summary, diagnostics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVERY_STAGE = {"learning_rate": "learning rate", "grad_norm": "gradient norm"}


@dataclass(frozen=True, slots=True)
class Panel:
    """A stage's own part of the report: title -> table (header row first), title -> figure."""

    tables: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    figures: Mapping[str, "Figure"] = field(default_factory=dict)


def no_panel(record: Mapping[str, Any]) -> Panel:
    """Return no tables and figures."""
    return Panel()


@dataclass(frozen=True, slots=True)
class Watched:
    """The logged metrics that are recorded, and the before/after metrics of the report's summary.

    Attributes:
        curves: metric of metrics.jsonl -> title of its curve.
        summary: metric recorded as ``<name>_before`` and ``<name>_after`` -> (label, format).
        diagnostics: run.json -> the stage's own part of the report.
    """

    curves: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    panel: Callable[[Mapping[str, Any]], Panel] = no_panel

    @property
    def logged(self) -> dict[str, str]:
        """Return every metric of metrics.jsonl with its curve's title."""
        return {**self.curves, **EVERY_STAGE}


SUPERVISED = Watched(
    curves={"loss": "training loss (nats per trained token)", "held_out_loss": "held-out loss"},
    numbers={
        "loss": ("training loss", ".3f"),
        "held_out_loss": ("held-out loss", ".3f"),
        "held_out_perplexity": ("held-out perplexity", ".1f"),
        "exact_match": ("exact match", ".1%"),
    },
)
