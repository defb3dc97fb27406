"""Terminal summary of a finished run: metrics, samples, paths, and the next command."""

import textwrap

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.training.result import Result

SAMPLE_WIDTH = 160


def print_summary(result: Result) -> None:
    """Print the summary of a finished run."""
    console = Console()
    for label, value in result.record["headline"].items():
        console.print(f"  {label}: [bold]{escape(value)}[/]", highlight=False)
    if result.samples:
        console.print(_samples(result))
    folder = result.directory
    console.print(
        f"result   {result.adapter}\nreport   {folder / 'report.html'}", highlight=False, soft_wrap=True
    )
    scores = "heads" in result.record["load"]
    following = f"score {folder} FILE.jsonl" if scores else f"chat {folder}"
    console.print(f"next     [bold]llm-align {following}[/]", highlight=False, soft_wrap=True)


def _samples(result: Result) -> Table:
    table = Table(show_lines=True, expand=False)
    known = any(sample.get("expected") for sample in result.samples)
    columns = ["prompt", *(["expected"] if known else []), "before", "after"]
    for column in columns:
        table.add_column(column, overflow="fold")
    for sample in result.samples:
        cells = [sample.get(column, "") for column in columns]
        table.add_row(*(escape(textwrap.shorten(cell, SAMPLE_WIDTH, placeholder=" …")) for cell in cells))
    return table
