"""What a reader looks at: a stage's curves over the steps, and its numbers before and after training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVERY_STAGE = {"learning_rate": "learning rate", "grad_norm": "gradient norm"}


@dataclass(frozen=True, slots=True)
class Panel:
    """What a stage adds to the report: tables, whose first line is their head, and figures; by titles."""

    tables: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    figures: Mapping[str, "Figure"] = field(default_factory=dict)


def no_panel(record: Mapping[str, Any]) -> Panel:
    """Add nothing."""
    return Panel()


@dataclass(frozen=True, slots=True)
class Watched:
    """What is kept of what a trainer logs, and which of the metrics stand at the top of the report.

    Attributes:
        curves: a key of metrics.jsonl -> the title of its curve.
        numbers: a metric whose names end in ``_before`` and ``_after`` -> its label and its format.
        panel: run.json -> what the stage's own part of the report shows.
    """

    curves: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    panel: Callable[[Mapping[str, Any]], Panel] = no_panel

    @property
    def logged(self) -> dict[str, str]:
        """Return every key that metrics.jsonl holds, with its curve's title."""
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
