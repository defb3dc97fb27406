"""Reward model diagnostics in the report: accuracy table, reliability curve, score histograms."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.training.watched import Panel

HEAD: tuple[str, ...] = (
    *("", "comparisons", "accuracy", "95 % interval", "loss", "margin"),
    *("calibration error", "longest wins", "length correlation"),
)
COLOURS = {"chosen": "#2b8a3e", "rejected": "#c92a2a", "before": "#adb5bd", "after": "#3b5bdb"}


def reward_panel(record: Mapping[str, Any]) -> Panel:
    """Return the tables and figures of run.json; empty without held-out comparisons."""
    found = record.get("comparisons", {})
    if "after" not in found:
        return Panel()
    lines: list[Sequence[str]] = [HEAD]
    for when in ("before", "after"):
        facts = found[when]
        lines.append(_line(f"all, {when}", facts["all"]))
        lines += [_line(f"head {name}, {when}", part) for name, part in facts["heads"].items()]
        lines += [_line(f"{name}, {when}", part) for name, part in facts["sources"].items()]
    heads = found["after"]["heads"] or {"": found["after"]["all"]}
    figures = {"reliability": _reliability(found)}
    figures |= {f"scores {name}": _histogram(part, name) for name, part in heads.items()}
    zeros: list[Sequence[str]] = [("head", "mean", "std", "completions")]
    for name, zero in record["normalisation"].items():
        zeros.append((name, f"{zero['mean']:.3f}", f"{zero['deviation']:.3f}", str(zero["completions"])))
    tables = {"Held-out comparisons": lines, "Reward normalization (chosen training completions)": zeros}
    return Panel(tables, figures)


def _line(name: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = facts["interval"]
    correlation = facts["correlation_with_length"]
    return (
        name,
        str(facts["comparisons"]),
        f"{facts['accuracy']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{facts['loss']:.3f}",
        f"{facts['margin']:.2f}",
        f"{facts['calibration_error']:.3f}",
        f"{facts['longer_is_better']:.1%}",
        "none" if correlation is None else f"{correlation:.2f}",
    )


def _reliability(found: Mapping[str, Any]) -> Figure:
    figure, axes = _axes("Calibration: accuracy by confidence")
    axes.plot([0.5, 1], [0.5, 1], color="#868e96", linewidth=1, linestyle=":")
    for when in ("before", "after"):
        curve = found[when]["all"]["reliability"]
        said, right = [point["said"] for point in curve], [point["right"] for point in curve]
        sizes = [200 * point["share"] + 4 for point in curve]
        axes.plot(said, right, color=COLOURS[when], linewidth=1.2, label=when)
        axes.scatter(said, right, s=sizes, color=COLOURS[when], alpha=0.7)
    axes.set(xlabel="confidence: predicted probability of the model's order", ylim=(-0.02, 1.05))
    axes.legend(frameon=False)
    return figure


def _histogram(facts: Mapping[str, Any], name: str) -> Figure:
    figure, axes = _axes(f"Scores of held-out completions {name}".rstrip())
    borders = facts["histogram"]["borders"]
    for kind in ("chosen", "rejected"):
        counts = facts["histogram"][kind]
        axes.stairs(counts, borders, fill=True, alpha=0.45, color=COLOURS[kind], label=kind)
    axes.set(xlabel="score")
    axes.legend(frameon=False)
    return figure


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
