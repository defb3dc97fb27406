"""Terminal output of ``llm-align run``: the plan before the first stage, the result after the last."""

import textwrap

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from align.pipeline.directory import REPORT
from align.pipeline.plan import Pipeline
from align.pipeline.report import HIDDEN, duration
from align.pipeline.running import PipelineResult
from finetune.recipe import yaml_file

SAMPLE_WIDTH = 160


def print_plan(pipeline: Pipeline, *, notes: bool) -> None:
    """Print the stages in order, their overrides, and the path of the report.

    Args:
        pipeline: the pipeline to run.
        notes: also print the recipes' notes, which each stage prints when it runs.
    """
    console = Console()
    console.print(f"[bold]{pipeline.name}[/]  {escape(pipeline.description)}", highlight=False)
    table = Table(box=None)
    for column in ("stage", "recipe", "init from", "rewards"):
        table.add_column(column, no_wrap=True)
    for entry in pipeline.entries:
        begins = entry.start or f"base {pipeline.recipes[entry.name].settings.model.base}"
        cells = (entry.name, entry.title, begins, ", ".join(entry.rewards))
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)
    for entry in pipeline.entries:
        for key, value in entry.given.items():
            line = f"{entry.name}.{key}={yaml_file.shown(value)} ({entry.origins[key]})"
            console.print(escape(line), highlight=False, soft_wrap=True, style="dim")
    told = [f"{name}: {note}" for name, recipe in pipeline.recipes.items() for note in recipe.notes]
    for note in [*pipeline.notes, *(told if notes else [])]:
        console.print(escape(note), highlight=False, soft_wrap=True)
    console.print(f"report   {pipeline.path / REPORT}", highlight=False, soft_wrap=True)


def print_result(result: PipelineResult) -> None:
    """Print the result of a finished pipeline: metrics, samples, and the next command."""
    console = Console()
    for name, stage in result.stages.items():
        seconds = result.record["stages"][name]["seconds"]
        console.print(f"\n[bold]{name}[/]  {stage.directory}  {duration(seconds)}", highlight=False)
        for label, value in stage.record["headline"].items():
            if label not in HIDDEN:
                console.print(f"  {label}: [bold]{escape(value)}[/]", highlight=False)
    if result.samples:
        console.print(_replies(result))
    total = sum(stage["seconds"] for stage in result.record["stages"].values())
    console.print(f"total time: {duration(total)}", highlight=False)
    last = result.last.directory
    following = f"score {last} FILE.jsonl" if "heads" in result.last.record["load"] else f"chat {last}"
    console.print(
        f"result   {result.last.adapter}\nreport   {result.directory / REPORT}\n"
        f"next     [bold]llm-align {following}[/]",
        highlight=False,
        soft_wrap=True,
    )


def _replies(result: PipelineResult) -> Table:
    """Return a table of prompts with every stage's completion and its rewards."""
    table = Table(show_lines=True, expand=False)
    for column in ("prompt", *result.samples[0]["replies"]):
        table.add_column(column, overflow="fold")
    for line in result.samples:
        replies = [_judged(text, name, line["rewards"]) for name, text in line["replies"].items()]
        table.add_row(*(escape(cell) for cell in (_short(line["prompt"]), *replies)))
    return table


def _judged(text: str, name: str, rewards: dict[str, dict[str, float]]) -> str:
    """Return a completion with its rewards below."""
    return "\n".join([_short(text), *(f"{judge} {said[name]:+.2f}" for judge, said in rewards.items())])


def _short(text: str) -> str:
    return textwrap.shorten(text, SAMPLE_WIDTH, placeholder=" …")
