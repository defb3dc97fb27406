"""Terminal summary of a finished run: metrics, samples, paths, and the next command."""

import textwrap

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.training.result import Result

SAMPLE_CELL_WIDTH = 160


def print_summary(result: Result) -> None:
    """Print the summary of a finished run."""
    console = Console()
    for label, value in result.record["summary"].items():
        console.print(f"  {label}: [bold]{escape(value)}[/]", highlight=False)
    if result.samples:
        console.print(_samples_table(result))
    folder = result.directory
    console.print(
        f"result   {result.adapter}\nreport   {folder / 'report.html'}", highlight=False, soft_wrap=True
    )
    is_reward_model = "heads" in result.record["reload"]
    next_command = f"score {folder} FILE.jsonl" if is_reward_model else f"chat {folder}"
    console.print(f"next     [bold]llm-align {next_command}[/]", highlight=False, soft_wrap=True)


def _samples_table(result: Result) -> Table:
    table = Table(show_lines=True, expand=False)
    has_expected = any(sample.get("expected") for sample in result.samples)
    columns = ["prompt", *(["expected"] if has_expected else []), "before", "after"]
    for column in columns:
        table.add_column(column, overflow="fold")
    for sample in result.samples:
        cells = [sample.get(column, "") for column in columns]
        table.add_row(
            *(escape(textwrap.shorten(cell, SAMPLE_CELL_WIDTH, placeholder=" …")) for cell in cells)
        )
    return table
