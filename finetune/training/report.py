"""Summary of a run, and ``report.html``: a page with curves, samples, checks, data and recipe."""

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune.evaluation.small_samples import describe_sample
from finetune.recipe.checkpoint_folder import describe_steps
from finetune.recipe.runs import read_finished_record
from finetune.training.atomic_files import write_text_atomically
from finetune.training.metric_specs import Diagnostics
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.pages import FOLDER, page_template
from finetune.training.run_directory import HELD_OUT, ROLLOUTS, RunDirectory

EVIDENCE = {
    ROLLOUTS: "sampled in training, with their rewards",
    HELD_OUT: "graded completions of held-out prompts, before and after training",
}
"""Files that the page links."""
PROPORTIONS = ("exact_match", "retention", "graders/", "rewards/accuracies", "val/eos_rate")
"""Held-out metrics that are proportions of cases; those of several completions per prompt are not."""
STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)
VERDICT = re.compile(r'\n?<section id="verdict".*?</section>', re.DOTALL)
MIN_FUNCTION_SHARE = 0.05
"""Share of a run's time from which on the summary shows that of its user functions."""


def run_summary(record: Mapping[str, Any], summary_metrics: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return the summary of a run: label -> formatted value.

    Args:
        record: run.json.
        summary_metrics: metric recorded before and after training -> (label, format).
    """
    metrics, parameters = record.get("metrics", {}), record["parameters"]
    share = parameters["trained"] / parameters["total"]
    summary = {"trained parameters": f"{parameters['trained']:,} ({share:.2%})"}
    if early := record.get("finished_early"):
        summary[f"{early['unit']}s"] = f"{describe_steps(record)}, finished early"
    for key, (label, style) in summary_metrics.items():
        before, after = (metrics.get(f"{key}_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            note = _sample_note(record, key, before, after)
            # z: a margin of -0.0001 is not shown as -0.000
            summary[label] = f"{before:z{style}} → {after:z{style}}{note}"
    rate = f", {metrics['tokens_per_second']:,} tokens/s" if "tokens_per_second" in metrics else ""
    if "train" in record["seconds"]:  # absent if a run resumes after its last step
        summary["training"] = f"{record['seconds']['train']:.0f} s{rate}"
    summary |= _code_summary(record)
    summary["peak memory"] = f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"
    return summary


def _sample_note(record: Mapping[str, Any], key: str, before: float, after: float) -> str:
    """Return what a metric was measured on: the window of a training metric, the cases of a proportion."""
    if not key.startswith(EVAL_PREFIX):
        window = record.get("window", 1)
        return f" (mean of the first and the last {window} log entries)" if window > 1 else ""
    count = record.get("cases", {}).get(key, 0)
    is_proportion = key.removeprefix(EVAL_PREFIX).startswith(PROPORTIONS) and min(before, after) >= 0
    if not count or not is_proportion or max(before, after) > 1:
        return ""
    return f" ({describe_sample(before, after, count)})"


def _code_summary(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the summary of user functions: their share of the time if it matters, and changes of code."""
    summary = {}
    calls: list[dict[str, float]] = list(record.get("function_calls", {}).values())
    seconds, total = sum(call["seconds"] for call in calls), sum(record["seconds"].values())
    if seconds > MIN_FUNCTION_SHARE * total:
        number = sum(int(call["calls"]) for call in calls)
        summary["user functions"] = f"{number:,} calls, {seconds:.0f} s ({seconds / total:.0%} of the run)"
    if changes := record.get("code_changes"):
        steps = ", ".join(str(change["step"]) for change in changes)
        summary["code changed"] = f"after step {steps}"
    return summary


def write_report(
    run: RunDirectory, curves: Mapping[str, str], diagnostics: Diagnostics | None = None
) -> None:
    """Write the page from the files of a run's folder.

    Args:
        run: the run's folder.
        curves: metric of metrics.jsonl -> title.
        diagnostics: the stage's own tables and figures.
    """
    diagnostics = diagnostics or Diagnostics()
    metrics = run.metrics()
    page = page_template(FOLDER, "report.html.j2").render(
        run=run.record,
        name=run.path.name,
        curves={
            title: _curve_svg(metrics, key, title) for key, title in curves.items() if _points(metrics, key)
        },
        figures=[figure_svg(figure) for figure in diagnostics.figures.values()],
        tables=diagnostics.tables,
        samples=run.samples(),
        evidence={name: text for name, text in EVIDENCE.items() if (run.path / name).is_file()},
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
    )
    run.write("report.html", page)


def rewrite_report(folder: Path) -> None:
    """Put the verdict of run.json on top of a run's report, in place of an earlier one.

    The rest of the page stays: its figures come from the training process.

    Raises:
        UserError: not the folder of a finished run.
    """
    verdict, file = read_finished_record(folder).get("verdict"), folder / "report.html"
    if verdict is None or not file.is_file():
        return
    # No text of a user has these tags: all of them are escaped.
    page = VERDICT.sub("", file.read_text(encoding="utf-8"))
    section = page_template(FOLDER, "verdict.html.j2").render(verdict=verdict)
    style = f"<style>\n{(FOLDER / 'style.css').read_text(encoding='utf-8')}</style>"
    page = STYLE.sub(lambda _: style, page, count=1).replace("<main>", f"<main>\n{section}", 1)
    write_text_atomically(file, page)


def _points(metrics: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in metrics if key in entry]


def _curve_svg(metrics: list[dict[str, Any]], key: str, title: str) -> str:
    """Return a curve over optimizer steps as an SVG element."""
    steps, values = zip(*_points(metrics, key), strict=True)
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        steps, values, marker="o" if len(steps) < 12 else "", markersize=4, color="#3b5bdb", linewidth=1.4
    )
    axes.set(xlabel="step", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure_svg(figure)


def figure_svg(figure: Figure) -> str:
    """Return a figure as an SVG element."""
    buffer = io.StringIO()
    # Texts stay texts: the browser has fonts for names that matplotlib's font lacks, such as Korean ones.
    with rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # No date: equal runs give equal pages.
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
