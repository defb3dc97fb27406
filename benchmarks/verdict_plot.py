"""Plot of the verdict benchmark: verdicts and saved replies over the true effect, error rates by unit."""

from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIXED, SEQUENTIAL, WRONG, GRID = "#3b5bdb", "#e8590c", "#c92a2a", "#868e96"


def write_plot(result: dict[str, Any], path: Path) -> None:
    """Write the figure of a result."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    power, saved, rates = figure.subplots(1, 3)
    models = sorted(result["models"], key=lambda entry: float(entry["effect"]))
    improved = [entry for entry in models if entry["effect"] >= 0]
    _plot_power(power, improved, result)
    effects = [100 * entry["effect"] for entry in improved]
    saved.plot(effects, [100 * entry["replies_saved"] for entry in improved], color=SEQUENTIAL, marker="o")
    saved.axhline(40, color=GRID, linewidth=0.8, linestyle=":")
    saved.set(xlabel="true effect, points of accuracy", ylabel="replies saved by the sequential rule, %")
    saved.set_ylim(0, 100)
    _plot_error_rates(rates, result)
    for axes in (power, saved, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Verdicts on {result['prompts']} prompts, at least 400 comparisons each ({result['device']})"
    )
    figure.savefig(path, dpi=120)
    click.echo(f"written to {path}")


def _plot_power(axes: Axes, models: list[dict[str, Any]], result: dict[str, Any]) -> None:
    effects = [100 * entry["effect"] for entry in models]
    for rule, color, label in (("fixed", FIXED, "all prompts"), ("sequential", SEQUENTIAL, "sequential")):
        rates = [entry[rule]["better"] for entry in models]
        axes.errorbar(
            effects,
            [100 * rate["rate"] for rate in rates],
            yerr=[
                [100 * (rate["rate"] - rate["low"]) for rate in rates],
                [100 * (rate["high"] - rate["rate"]) for rate in rates],
            ],
            color=color,
            marker="o",
            capsize=3,
            label=label,
        )
    axes.axhline(80, color=GRID, linewidth=0.8, linestyle=":")
    axes.axvline(100 * result["smallest_effect"], color=GRID, linewidth=0.8, linestyle=":")
    axes.set(xlabel="true effect, points of accuracy", ylabel="verdict: better, %")
    axes.set_ylim(0, 103)
    axes.legend(frameon=False, fontsize=8)


def _plot_error_rates(axes: Axes, result: dict[str, Any]) -> None:
    equal = next(entry for entry in result["models"] if entry["replaced"] == 0)
    recipes = result["recipes"]
    bars = {
        "models, all prompts": equal["fixed"]["either"],
        "models, sequential": equal["sequential"]["either"],
        "models, five suites": result["equal_models"]["five suites"],
        "models, two replies a prompt": result["equal_models"]["two replies a prompt"],
        "recipes, accuracy of 5 runs each": recipes["accuracy"]["equal, more draws"]["either"],
        "recipes, loss of 5 runs each": recipes["loss"]["equal, more draws"]["either"],
        "recipes, one run each": recipes["prompts_as_units"],
    }
    for position, rate in enumerate(bars.values()):
        low, high = 100 * (rate["rate"] - rate["low"]), 100 * (rate["high"] - rate["rate"])
        color = FIXED if rate["rate"] <= 0.05 else WRONG
        axes.errorbar(100 * rate["rate"], position, xerr=[[low], [high]], color=color, marker="o", capsize=3)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(5, color=GRID, linewidth=0.8, linestyle=":")
    axes.set(xlabel="wrong verdicts on equals, %", xlim=(0, None))
