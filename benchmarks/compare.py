"""All adapters on the bundled task with an equal budget: the same rows, batches and optimizer steps.

    make bench-compare      or      python -m benchmarks.compare --steps 150

Each adapter runs in a process of its own (for its own peak memory), on the quickstart's recipe, at several
multiples of its default learning rate, of which the one with the lowest held-out loss counts: the bundled
model is tiny and takes higher rates than the papers' models. Writes compare-DATE.json, .md and .png into
benchmarks/results/.
"""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from align import load_recipe, run
from finetune.distributed.hardware import detect_hardware
from finetune.recipe.discovery import ADAPTERS, load_plugin, plugin_names

RESULTS_DIR = Path(__file__).parent / "results"
NEEDS_BIASES = "bitfit"
"""Excluded: the bundled base has no bias terms."""

COLUMN_TITLES = {
    "adapter": "adapter",
    "trained": "trained parameters",
    "exact": "exact match",
    "held_out_loss": "held-out loss",
    "seconds": "training, lora = 1",
    "peak_gib": "peak memory (GiB)",
    "learning_rate": "learning rate",
}


@click.command()
@click.option("--steps", default=150, show_default=True, help="Optimizer steps of 16 rows.")
@click.option("--rows", default=100, show_default=True, help="Held-out rows for exact match.")
@click.option("--factors", default="3,10", show_default=True, help="Multiples of the default learning rate.")
@click.option("--only", help="One adapter at one rate, METHOD:RATE; prints its results.")
@click.option("--methods", help="Adapters, comma-separated; default: all.")
def main(steps: int, rows: int, factors: str, only: str | None, methods: str | None) -> None:
    """Measure, and write table and plot."""
    if only:
        method, rate = only.split(":")
        click.echo(json.dumps(_measure_adapter(method, float(rate), steps=steps, rows=rows)))
        return
    selected = (
        methods.split(",") if methods else [name for name in plugin_names(ADAPTERS) if name != NEEDS_BIASES]
    )
    results = []
    for method in selected:
        default_rate = load_plugin(ADAPTERS, method, where="compare").TRAITS.learning_rate
        runs = [
            _measure_in_subprocess(method, default_rate * float(factor), steps=steps, rows=rows)
            for factor in factors.split(",")
        ]
        results.append(min(runs, key=lambda entry: entry["held_out_loss"]) | {"tried": runs})
        click.echo(json.dumps({key: results[-1][key] for key in COLUMN_TITLES}))
    _write(results, {"steps": steps, "rows": rows, "factors": factors})


def _measure_in_subprocess(method: str, rate: float, *, steps: int, rows: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    arguments = ["--steps", str(steps), "--rows", str(rows), "--only", f"{method}:{rate:g}"]
    command = [sys.executable, "-m", "benchmarks.compare", *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def _measure_adapter(method: str, rate: float, *, steps: int, rows: int) -> dict[str, Any]:
    # The adapter's own defaults: the quickstart's rank and alpha are chosen for LoRA.
    adapter_values = load_plugin(ADAPTERS, method, where="compare").Settings().model_dump()
    settings = {
        f"adapter.{key}": adapter_values[key] for key in ("rank", "alpha", "dropout") if key in adapter_values
    }
    settings |= {
        "train.max_steps": steps,
        "train.learning_rate": rate,
        "evaluate.exact_match": rows,
        "evaluate.max_new_tokens": 64,
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("quickstart", adapter=method, out=f"{folder}/run", settings=settings)
        record = run(recipe).record
    return {
        "adapter": method,
        "trained": record["parameters"]["trained"],
        "exact": record["metrics"]["eval/exact_match_after"],
        "held_out_loss": record["metrics"]["eval/loss_after"],
        "seconds": record["seconds"]["train"],
        "peak_gib": record["peak_memory_bytes"] / 2**30,
        "learning_rate": rate,
    }


def _write(results: list[dict[str, Any]], budget: dict[str, Any]) -> None:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    name = RESULTS_DIR / f"compare-{date[:10]}"
    lora_seconds = next(
        (entry["seconds"] for entry in results if entry["adapter"] == "lora"), results[0]["seconds"]
    )
    content = {"date": date, "device": detect_hardware().name, **budget, "results": results}
    name.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = _header(content) + _table(results, lora_seconds)
    name.with_suffix(".md").write_text(table, encoding="utf-8")
    _plot(results).savefig(name.with_suffix(".png"), dpi=120)
    click.echo(table + f"\nwritten to {name}.json, .md and .png")


def _header(content: dict[str, Any]) -> str:
    return (
        f"All adapters on the quickstart's rows: {content['steps']} optimizer steps of 16 rows, the best of "
        f"{content['factors']} times its default learning rate, {content['rows']} rows of exact match, "
        f"{content['device']}, {content['date'][:10]}. Written by `make bench-compare`.\n\n"
    )


def _table(results: list[dict[str, Any]], lora_seconds: float) -> str:
    rows = [
        f"| `{entry['adapter']}` | {entry['trained']:,} | {entry['exact']:.0%} "
        f"| {entry['held_out_loss']:.3f} | {entry['seconds'] / lora_seconds:.2f} | {entry['peak_gib']:.2f} "
        f"| {entry['learning_rate']:g} |"
        for entry in sorted(results, key=lambda entry: entry["held_out_loss"])
    ]
    titles = f"| {' | '.join(COLUMN_TITLES.values())} |"
    return "\n".join([titles, f"|{' --- |' * len(COLUMN_TITLES)}", *rows]) + "\n"


def _plot(results: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="trained parameters", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for entry in results:
        axes.scatter(entry["trained"], entry["held_out_loss"], color="#3b5bdb", s=18)
    figure.draw_without_rendering()
    used: list[Bbox] = []
    for entry in results:
        used.append(_label(axes, entry["adapter"], (entry["trained"], entry["held_out_loss"]), used))
    return figure


def _label(axes: Axes, name: str, point: tuple[float, float], used: list[Bbox]) -> Bbox:
    """Write a name next to its point, where it covers no other name, and return the space it takes."""
    label = axes.annotate(name, point, xytext=(0, 0), textcoords="offset points", fontsize=8)
    for height, side in product((3, -9, 13, -19, 23, -29), ("left", "right")):
        label.set(ha=side, position=(4 if side == "left" else -4, height))
        box = label.get_window_extent()
        if not any(box.overlaps(other) for other in used):
            break
    return box


if __name__ == "__main__":
    main()
