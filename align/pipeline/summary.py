"""Terminal output of ``llm-align run``: the plan before the first stage, the result after the last."""

import textwrap

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from align.pipeline.directory import REPORT_FILE
from align.pipeline.plan import Pipeline
from align.pipeline.report import HIDDEN_SUMMARY_ENTRIES, format_duration
from align.pipeline.runner import PipelineResult
from finetune.recipe import yaml_file

COMPLETION_WIDTH = 160


def print_pipeline(pipeline: Pipeline, *, notes: bool) -> None:
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
    console.print(f"report   {pipeline.path / REPORT_FILE}", highlight=False, soft_wrap=True)


def print_pipeline_result(result: PipelineResult) -> None:
    """Print the result of a finished pipeline: metrics, samples, and the next command."""
    console = Console()
    for name, stage in result.stages.items():
        seconds = result.record["stages"][name]["seconds"]
        console.print(f"\n[bold]{name}[/]  {stage.directory}  {format_duration(seconds)}", highlight=False)
        for label, value in stage.record["summary"].items():
            if label not in HIDDEN_SUMMARY_ENTRIES:
                console.print(f"  {label}: [bold]{escape(value)}[/]", highlight=False)
    if result.samples:
        console.print(_completions_table(result))
    total = sum(stage["seconds"] for stage in result.record["stages"].values())
    console.print(f"total time: {format_duration(total)}", highlight=False)
    last = result.last.directory
    next_command = f"score {last} FILE.jsonl" if "heads" in result.last.record["reload"] else f"chat {last}"
    console.print(
        f"result   {result.last.adapter}\nreport   {result.directory / REPORT_FILE}\n"
        f"next     [bold]llm-align {next_command}[/]",
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
    return textwrap.shorten(text, COMPLETION_WIDTH, placeholder=" …")
