"""Output of a pipeline: its plan and result in the terminal, and ``report.html``.

The page shows the stages, completions of the same prompts, and each run's report.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table

from align.pipeline.directory import REPORT_FILE, RESOLVED_FILE, PipelineDirectory, PipelineResult
from align.pipeline.entries import StageEntry
from align.pipeline.plan import Pipeline
from finetune.recipe import yaml_file
from finetune.recipe.console import Terminal
from finetune.recipe.discovery import plugin_summary, stage_names
from finetune.recipe.terminal import command_line
from finetune.recipe.visible_text import visible
from finetune.training.pages import page_template
from finetune.training.result import Result

COMPLETION_WIDTH = 160
HIDDEN_SUMMARY_ENTRIES = ("training", "peak memory")
"""Summary entries of a run that the stage table omits; the run's section shows them."""


def write_pipeline_report(
    pipeline: Pipeline, folder: PipelineDirectory, results: Mapping[str, Result]
) -> None:
    """Write the report from the folders of the pipeline and its runs."""
    samples = folder.samples()
    generating_stages = list(samples[0]["replies"]) if samples else []
    stages = [_stage_context(entry, results[entry.name], pipeline, folder) for entry in pipeline.entries]
    page = page_template(Path(__file__).parent, "report.html.j2").render(
        pipeline=pipeline,
        record=folder.record,
        stages=stages,
        total=format_duration(sum(stage["seconds"] for stage in folder.record["stages"].values())),
        lines=samples,
        writers=generating_stages,
        unseen=bool(generating_stages) and bool(results[generating_stages[-1]].record["data"]["held_out"]),
        judges=list(samples[0]["rewards"]) if samples else [],
        means=mean_rewards(samples),
        resolved=(folder.path / RESOLVED_FILE).read_text(encoding="utf-8"),
        versions=list(results.values())[-1].record["versions"],
    )
    folder.write(REPORT_FILE, page)


def mean_rewards(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean reward of each stage's completions: reward model -> stage -> number."""
    if not samples:
        return {}
    return {
        reward_stage: {
            name: fmean(sample["rewards"][reward_stage][name] for sample in samples) for name in stage_rewards
        }
        for reward_stage, stage_rewards in samples[0]["rewards"].items()
    }


def format_duration(seconds: float) -> str:
    """Format a duration.

    >>> [format_duration(seconds) for seconds in (4.2, 95, 7300)]
    ['4 s', '1 min 35 s', '2 h 1 min']
    """
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _stage_context(
    entry: StageEntry, result: Result, pipeline: Pipeline, folder: PipelineDirectory
) -> dict[str, Any]:
    """Return the template context of a stage."""
    recipe = pipeline.recipes[entry.name]
    summary = result.record["summary"]
    return {
        "name": entry.name,
        "title": entry.title,
        "summary": plugin_summary(stage_names()[entry.stage], entry.stage),
        "description": recipe.description,
        "init_from": entry.init_from or f"base {recipe.settings.model.base}",
        "rewards": entry.rewards,
        "time": format_duration(folder.record["stages"][entry.name]["seconds"]),
        "summary_metrics": {
            label: value for label, value in summary.items() if label not in HIDDEN_SUMMARY_ENTRIES
        },
        "run": str(result.directory),
        "page": Path(os.path.relpath(result.directory / REPORT_FILE, folder.path)).as_posix(),
        "body": _report_body(result.directory / REPORT_FILE),
    }


def _report_body(report: Path) -> str:
    """Return the body of a run's report, to embed it."""
    if not report.is_file():
        return "<p>The report of this run no longer exists.</p>"
    text = report.read_text(encoding="utf-8")
    tag = "main" if "<main>" in text else "body"  # reports of earlier versions have no <main>
    return text[text.index(f"<{tag}>") + len(tag) + 2 : text.rindex(f"</{tag}>")]


def print_pipeline(pipeline: Pipeline, *, notes: bool) -> None:
    """Print the stages in order, their overrides, and the path of the report.

    Args:
        pipeline: the pipeline to run.
        notes: also print the recipes' notes, which each stage prints when it runs.
    """
    console = Terminal()
    console.print(f"[bold]{escape(pipeline.name)}[/]  {escape(pipeline.description)}", highlight=False)
    table = Table(box=None)
    for column in ("stage", "recipe", "init from", "rewards"):
        table.add_column(column, no_wrap=True)
    for entry in pipeline.entries:
        init_from = entry.init_from or f"base {pipeline.recipes[entry.name].settings.model.base}"
        cells = (entry.name, entry.title, init_from, ", ".join(entry.rewards))
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)
    for entry in pipeline.entries:
        for key, value in entry.overrides.items():
            line = f"{entry.name}.{key}={yaml_file.format_value(value)} ({entry.origins[key]})"
            console.print(escape(line), highlight=False, soft_wrap=True, style="dim")
    recipe_notes = [f"{name}: {note}" for name, recipe in pipeline.recipes.items() for note in recipe.notes]
    for note in [*pipeline.notes, *(recipe_notes if notes else [])]:
        console.print(escape(note), highlight=False, soft_wrap=True)
    report = escape(str(pipeline.path / REPORT_FILE))
    console.print(f"report   {report}", highlight=False, soft_wrap=True)


def print_pipeline_result(result: PipelineResult) -> None:
    """Print the result of a finished pipeline: metrics, samples, and the next command."""
    console = Terminal()
    for name, stage in result.stages.items():
        seconds = result.record["stages"][name]["seconds"]
        title = f"\n[bold]{escape(name)}[/]  {escape(str(stage.directory))}"
        console.print(f"{title}  {format_duration(seconds)}", highlight=False)
        for label, value in stage.record["summary"].items():
            if label not in HIDDEN_SUMMARY_ENTRIES:
                console.print(f"  {label}: [bold]{escape(value)}[/]", highlight=False)
    if result.samples:
        console.print(_completions_table(result))
    total = sum(stage["seconds"] for stage in result.record["stages"].values())
    console.print(f"total time: {format_duration(total)}", highlight=False)
    last = result.last.directory
    is_reward_model = "heads" in result.last.record["reload"]
    next_command = command_line(*(("score", last, "FILE.jsonl") if is_reward_model else ("chat", last)))
    paths = f"result   {result.last.adapter}\nreport   {result.directory / REPORT_FILE}"
    console.print(
        f"{escape(paths)}\nnext     [bold]{escape(next_command)}[/]",
        highlight=False,
        soft_wrap=True,
    )


def _completions_table(result: PipelineResult) -> Table:
    """Return a table of prompts with every stage's completion and its rewards."""
    table = Table(show_lines=True, expand=False)
    for column in ("prompt", *result.samples[0]["replies"]):
        table.add_column(column, overflow="fold")
    for sample in result.samples:
        completions = [
            _completion_with_rewards(text, name, sample["rewards"])
            for name, text in sample["replies"].items()
        ]
        table.add_row(*(escape(cell) for cell in (_shorten(sample["prompt"]), *completions)))
    return table


def _completion_with_rewards(text: str, name: str, rewards: dict[str, dict[str, float]]) -> str:
    """Return a completion with its rewards below."""
    return "\n".join(
        [
            _shorten(text),
            *(
                f"{reward_stage} {stage_rewards[name]:+.2f}"
                for reward_stage, stage_rewards in rewards.items()
            ),
        ]
    )


def _shorten(text: str) -> str:
    return textwrap.shorten(visible(text), COMPLETION_WIDTH, placeholder=" …")
