"""Write ``report.html`` of a pipeline: its stages, completions of the same prompts, each run's report."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader

import finetune.training
from align.pipeline.directory import REPORT, RESOLVED, PipelineDirectory
from align.pipeline.entry import Entry
from align.pipeline.plan import Pipeline
from finetune.recipe.discovery import plugin_summary, stage_names
from finetune.training.result import Result

HIDDEN = ("training", "peak memory")
"""Summary entries of a run that the stage table omits; the run's section shows them."""


def write_report(pipeline: Pipeline, folder: PipelineDirectory, results: Mapping[str, Result]) -> None:
    """Write the report from the folders of the pipeline and its runs."""
    folders = [Path(__file__).parent, Path(finetune.training.__path__[0])]
    environment = Environment(loader=FileSystemLoader(folders), autoescape=True)
    lines = folder.samples()
    writers = list(lines[0]["replies"]) if lines else []
    stages = [_stage(entry, results[entry.name], pipeline, folder) for entry in pipeline.entries]
    page = environment.get_template("report.html.j2").render(
        pipeline=pipeline,
        record=folder.record,
        stages=stages,
        total=duration(sum(stage["seconds"] for stage in folder.record["stages"].values())),
        lines=lines,
        writers=writers,
        unseen=bool(writers) and bool(results[writers[-1]].record["data"]["held_out"]),
        judges=list(lines[0]["rewards"]) if lines else [],
        means=mean_rewards(lines),
        resolved=(folder.path / RESOLVED).read_text(encoding="utf-8"),
        versions=list(results.values())[-1].record["versions"],
    )
    folder.write(REPORT, page)


def mean_rewards(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean reward of each stage's completions: reward model -> stage -> number."""
    if not lines:
        return {}
    return {
        judge: {name: fmean(line["rewards"][judge][name] for line in lines) for name in found}
        for judge, found in lines[0]["rewards"].items()
    }


def duration(seconds: float) -> str:
    """Format a duration.

    >>> [duration(seconds) for seconds in (4.2, 95, 7300)]
    ['4 s', '1 min 35 s', '2 h 2 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _stage(entry: Entry, result: Result, pipeline: Pipeline, folder: PipelineDirectory) -> dict[str, Any]:
    """Return the template context of a stage."""
    recipe = pipeline.recipes[entry.name]
    headline = result.record["headline"]
    return {
        "name": entry.name,
        "title": entry.title,
        "summary": plugin_summary(stage_names()[entry.stage], entry.stage),
        "description": recipe.description,
        "start": entry.start or f"base {recipe.settings.model.base}",
        "rewards": entry.rewards,
        "time": duration(folder.record["stages"][entry.name]["seconds"]),
        "headline": {label: value for label, value in headline.items() if label not in HIDDEN},
        "run": str(result.directory),
        "page": Path(os.path.relpath(result.directory / REPORT, folder.path)).as_posix(),
        "body": _body(result.directory / REPORT),
    }


def _body(page: Path) -> str:
    """Return the body of a run's report, to embed it."""
    if not page.is_file():
        return "<p>The report of this run no longer exists.</p>"
    text = page.read_text(encoding="utf-8")
    tag = "main" if "<main>" in text else "body"  # reports of earlier versions have no <main>
    return text[text.index(f"<{tag}>") + len(tag) + 2 : text.rindex(f"</{tag}>")]
