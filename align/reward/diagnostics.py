"""Reward model metrics in the report: curves, summary, accuracy table, reliability, score histograms."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.reward.settings import Settings
from finetune.evaluation.small_samples import wilson_interval
from finetune.training.findings import Finding
from finetune.training.metric_specs import Diagnostics, MetricSpec
from finetune.training.metrics import EVAL_PREFIX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARD_CURVES = {
    "loss": "training loss (nats per comparison)",
    "rewards/accuracies": "accuracy (fraction of comparisons ranked correctly)",
    "rewards/margins": "reward margin (better minus worse)",
    "rewards/mean": "mean reward",
    "eval/loss": "held-out loss",
    "eval/rewards/accuracies": "held-out accuracy",
    "eval/rewards/margins": "held-out margin",
}
CHANCE, USEFUL_ACCURACY = 0.5, 0.6
"""Accuracy of a coin; and, our choice, one below which a reward model is of no use."""
TABLE_HEADER: tuple[str, ...] = (
    *("", "comparisons", "accuracy", "95 % interval", "loss", "margin"),
    *("calibration error", "longest wins", "length correlation"),
)
PLOT_COLORS = {"chosen": "#2b8a3e", "rejected": "#c92a2a", "before": "#adb5bd", "after": "#3b5bdb"}


def reward_metric_spec(settings: Settings) -> MetricSpec:
    """Return the curves and values to show for these heads."""
    summary = {
        "eval/rewards/accuracies": ("held-out accuracy", ".1%"),
        "eval/loss": ("held-out loss", ".3f"),
        "eval/rewards/margins": ("held-out margin", ".2f"),
    }
    heads = settings.reward.heads if len(settings.reward.heads) > 1 else []
    summary |= {
        f"{EVAL_PREFIX}rewards/accuracies/{name}": (f"held-out accuracy, {name}", ".1%") for name in heads
    }
    return MetricSpec(
        curves=REWARD_CURVES,
        summary=summary,
        diagnostics=reward_diagnostics,
        generates=False,
        first_last=("loss", "rewards/accuracies"),
    )


def diagnose_reward(metrics: Mapping[str, float], num_held_out: int) -> list[Finding]:
    """Return the finding on held-out accuracy against chance; empty without held-out comparisons.

    Args:
        metrics: the metrics of run.json.
        num_held_out: held-out comparisons; a ranked list counts once, its comparisons are not independent.
    """
    accuracy = metrics.get("eval/rewards/accuracies_after")
    if accuracy is None or not num_held_out:
        return []
    low, high = wilson_interval(accuracy, num_held_out)
    evidence = (
        f"held-out {accuracy:.1%} of {num_held_out:,} comparisons (95 % interval {low:.0%} to {high:.0%})"
    )
    if low > CHANCE:
        return [Finding("accuracy", evidence, "better than chance")]
    training = metrics.get("rewards/accuracies_after", CHANCE)
    if high < CHANCE and training > USEFUL_ACCURACY:
        evidence = f"{training:.1%} in training, {evidence}"
        action = "are `chosen` and `rejected` exchanged in some rows?"
        return [Finding("accuracy", evidence, "worse than chance", action)]
    if high < USEFUL_ACCURACY:
        action = "raise train.learning_rate, train longer, or more comparisons"
        return [Finding("accuracy", evidence, "no better than chance", action)]
    return [Finding("accuracy", evidence, "too few held-out comparisons to tell it from chance")]


def reward_diagnostics(record: Mapping[str, Any]) -> Diagnostics:
    """Return the tables and figures of run.json; empty without held-out comparisons."""
    comparisons = record.get("preference_data", {})
    if "after" not in comparisons:
        return Diagnostics()
    table_rows: list[Sequence[str]] = [TABLE_HEADER]
    for when in ("before", "after"):
        metrics = comparisons[when]
        table_rows.append(_metrics_row(f"all, {when}", metrics["all"]))
        table_rows += [
            _metrics_row(f"head {name}, {when}", part_metrics)
            for name, part_metrics in metrics["heads"].items()
        ]
        table_rows += [
            _metrics_row(f"{name}, {when}", part_metrics) for name, part_metrics in metrics["sources"].items()
        ]
    heads = comparisons["after"]["heads"] or {"": comparisons["after"]["all"]}
    figures = {"reliability": _reliability_figure(comparisons)}
    figures |= {
        f"scores {name}": _score_histogram(part_metrics, name) for name, part_metrics in heads.items()
    }
    normalization_rows: list[Sequence[str]] = [("head", "mean", "std", "completions")]
    for name, normalization in record["reward_normalization"].items():
        normalization_rows.append(
            (
                name,
                f"{normalization['mean']:.3f}",
                f"{normalization['std']:.3f}",
                str(normalization["completions"]),
            )
        )
    tables = {
        "Held-out comparisons": table_rows,
        "Reward normalization (chosen training completions)": normalization_rows,
    }
    return Diagnostics(tables, figures)


def _metrics_row(name: str, metrics: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = metrics["interval"]
    correlation = metrics["correlation_with_length"]
    return (
        name,
        str(metrics["comparisons"]),
        f"{metrics['accuracy']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{metrics['loss']:.3f}",
        f"{metrics['margin']:.2f}",
        f"{metrics['calibration_error']:.3f}",
        f"{metrics['longer_is_better']:.1%}",
        "none" if correlation is None else f"{correlation:.2f}",
    )


def _reliability_figure(comparisons: Mapping[str, Any]) -> "Figure":
    figure, axes = _axes("Calibration: accuracy by confidence")
    axes.plot([0.5, 1], [0.5, 1], color="#868e96", linewidth=1, linestyle=":")
    for when in ("before", "after"):
        curve = comparisons[when]["all"]["reliability"]
        confidence, accuracy = (
            [point["confidence"] for point in curve],
            [point["accuracy"] for point in curve],
        )
        marker_sizes = [200 * point["fraction"] + 4 for point in curve]
        axes.plot(confidence, accuracy, color=PLOT_COLORS[when], linewidth=1.2, label=when)
        axes.scatter(confidence, accuracy, s=marker_sizes, color=PLOT_COLORS[when], alpha=0.7)
    axes.set(xlabel="confidence: predicted probability of the model's order", ylim=(-0.02, 1.05))
    axes.legend(frameon=False)
    return figure


def _score_histogram(metrics: Mapping[str, Any], name: str) -> "Figure":
    figure, axes = _axes(f"Scores of held-out completions {name}".rstrip())
    bin_edges = metrics["histogram"]["bin_edges"]
    for kind in ("chosen", "rejected"):
        counts = metrics["histogram"][kind]
        axes.stairs(counts, bin_edges, fill=True, alpha=0.45, color=PLOT_COLORS[kind], label=kind)
    axes.set(xlabel="score")
    axes.legend(frameon=False)
    return figure


def _axes(title: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
