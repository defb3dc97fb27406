"""Tables and the figure of a classifier's metrics, for the terminal and for reports."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from finetune.evaluation.classification import Classification, most_confused

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = Sequence[Sequence[str]]
"""Rows of cells, the header first."""
WIDEST_MATRIX = 10
"""Classes from which on a confusion matrix is no table, but its most frequent entries and the figure."""
CONFUSIONS = 10
LONGEST_NAME = 24
"""Characters of a class in a matrix or a figure."""


def classification_summary(metrics: Classification) -> str:
    """Return accuracy with its interval, macro-F1 and calibration error in one line."""
    low, high = metrics["interval"]
    return (
        f"accuracy {metrics['accuracy']:.1%} (95 % interval {100 * low:.0f} to {high:.0%}, "
        f"{metrics['rows']:,} rows; most frequent class {metrics['majority']:.1%}), "
        f"macro-F1 {metrics['macro_f1']:.3f}, calibration error {metrics['calibration_error']:.3f}"
    )


def classification_tables(metrics: Classification) -> Mapping[str, Table]:
    """Return the tables of a classifier's metrics: title -> rows, the header first."""
    return {
        "Classes": _class_table(metrics),
        **_confusion_table(metrics),
        "Calibration: probability of the chosen label": _reliability_table(metrics),
    }


def _class_table(metrics: Classification) -> Table:
    header = ("class", "rows", "chosen", "precision", "recall", "F1")
    rows = [
        (
            entry["label"],
            f"{entry['support']:,}",
            f"{entry['predicted']:,}",
            # Of a class that is never chosen there is no precision, and no recall of one without rows.
            f"{entry['precision']:.1%}" if entry["predicted"] else "–",
            f"{entry['recall']:.1%}" if entry["support"] else "–",
            f"{entry['f1']:.3f}" if entry["support"] or entry["predicted"] else "–",
        )
        for entry in metrics["classes"]
    ]
    return [header, *rows]


def _confusion_table(metrics: Classification) -> Mapping[str, Table]:
    names = [_short(entry["label"]) for entry in metrics["classes"]]
    if len(names) > WIDEST_MATRIX:
        confusions = [
            (label, chosen, str(count)) for label, chosen, count in most_confused(metrics, CONFUSIONS)
        ]
        return {"Most frequent confusions": [("class", "chosen instead", "rows"), *confusions]}
    num_choices = len(metrics["confusion"][0])
    header = ("class \\ chosen", *names[:num_choices])
    rows = [
        (name, *(str(count) if count else "·" for count in counts))
        for name, counts in zip(names, metrics["confusion"], strict=True)
    ]
    return {"Confusion matrix": [header, *rows]}


def _reliability_table(metrics: Classification) -> Table:
    rows = [
        (f"{entry['confidence']:.1%}", f"{entry['accuracy']:.1%}", f"{entry['fraction']:.1%}")
        for entry in metrics["reliability"]
    ]
    return [("mean probability", "accuracy", "share of rows"), *rows]


def confusion_figure(metrics: Classification) -> "Figure":
    """Return the confusion matrix as a picture: shares of each class's rows, with counts where they fit."""
    import numpy as np
    from matplotlib.figure import Figure

    counts = np.asarray(metrics["confusion"], dtype=float)
    names = [_short(entry["label"]) for entry in metrics["classes"]]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(3.0 + 0.28 * len(names), 14.0)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    font_size = 9 if len(names) <= 20 else 4
    axes.set_xticks(
        range(counts.shape[1]), names[: counts.shape[1]], rotation=60, ha="right", fontsize=font_size
    )
    axes.set_yticks(range(len(names)), names, fontsize=font_size)
    axes.set(xlabel="chosen", ylabel="class", title="confusion matrix")
    for row, column in np.argwhere(counts > 0):
        color = "white" if shares[row, column] > 0.6 else "black"
        text = f"{counts[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=font_size)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
