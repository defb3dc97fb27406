"""``report.html``: a self-contained page with curves, samples, checks, data and recipe."""

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template
from matplotlib.figure import Figure

from finetune.training.run_directory import RunDirectory
from finetune.training.watched import Panel


def write_report(run: RunDirectory, curves: Mapping[str, str], panel: Panel | None = None) -> None:
    """Write the page from the files of a run's folder.

    Args:
        run: the run's folder.
        curves: metric of metrics.jsonl -> title.
        diagnostics: the stage's own tables and figures.
    """
    panel = panel or Panel()
    metrics = run.metrics()
    page = _template().render(
        run=run.record,
        name=run.path.name,
        curves={title: _curve(metrics, key, title) for key, title in curves.items() if _points(metrics, key)},
        figures=[_svg(figure) for figure in panel.figures.values()],
        tables=panel.tables,
        samples=run.samples(),
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
    )
    run.write("report.html", page)


@cache
def _template() -> Template:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.j2")


def _points(metrics: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in metrics if key in line]


def _curve(metrics: list[dict[str, Any]], key: str, title: str) -> str:
    """Return a curve over optimizer steps as an SVG element."""
    steps, values = zip(*_points(metrics, key), strict=True)
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        steps, values, marker="o" if len(steps) < 12 else "", markersize=4, color="#3b5bdb", linewidth=1.4
    )
    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})  # no date: equal runs give equal pages
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
