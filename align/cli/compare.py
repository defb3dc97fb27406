"""``llm-align compare``: runs and evaluations side by side, in the terminal and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from align.cli.completion import complete_compared
from finetune.recipe.silence import silence_libraries
from finetune.recipe.terminal import echo, echo_json

if TYPE_CHECKING:
    from align.evaluation.compare import Comparison

EPILOG = """\b
Examples:
  llm-align compare sft-alpaca sft-dolly --html compare.html
  llm-align compare runs/eval-tiny runs/sft-quickstart-1a2b3c4d
"""


@click.command("compare", epilog=EPILOG)
@click.argument("names", nargs=-1, metavar="RUN RUN...", shell_complete=complete_compared)
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Also write an HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(names: tuple[str, ...], html: Path | None, as_json: bool) -> None:
    """Compare two or more runs, finished or not, or evaluations: settings, quality, curves, costs, answers.

    RUN is a run directory, its name or a prefix, or a folder that `llm-align eval` has written for a base.
    Quality comes from evaluations of the same suites, or else from the held-out prompts that runs share.
    """
    silence_libraries()
    from align.evaluation.compare import compare_models
    from align.evaluation.models import load_models

    models, notes = load_models(names)
    comparison = compare_models(models)
    for note in notes:
        echo(note, err=True)
    if html is not None:
        # matplotlib takes a second to import.
        from align.evaluation.pages import comparison_page
        from finetune.training.pages import write_named_page

        write_named_page(comparison_page(comparison), html)
    if as_json:
        echo_json(comparison.record())
    else:
        print_comparison(comparison, page=html)


def print_comparison(comparison: "Comparison", *, page: Path | None = None) -> None:
    """Print models, quality, settings that differ, costs, and the result in one sentence."""
    from align.evaluation.models import NOTHING
    from finetune.evaluation.figures import format_estimate
    from finetune.recipe.console import Terminal

    console = Terminal()
    for model in comparison.models:
        text = f"[bold]{model.letter}[/]  {escape(str(model.folder))}  {escape(model.status)}"
        console.print(text, highlight=False, soft_wrap=True)
    letters = [model.letter for model in comparison.models]
    quality = {
        f"{figures.suite} ({figures.metric})": [
            NOTHING if estimate is None else format_estimate(estimate) for estimate in figures.estimates
        ]
        for figures in comparison.quality
    }
    settings = {key: [model.setting_text(key) for model in comparison.models] for key in comparison.settings}
    held_out = {
        name: [NOTHING if value is None else f"{value:.4g}" for value in values]
        for name, values in comparison.held_out.items()
    }
    _print_table(console, f"quality on the same {comparison.source}, 95 % intervals", letters, quality)
    _print_table(console, "metrics of held-out rows", letters, held_out)
    _print_table(console, "settings that differ", letters, settings)
    _print_table(console, "time, tokens, memory", letters, comparison.costs)
    for note in comparison.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(comparison.sentence)}[/]", highlight=False, soft_wrap=True)
    if page is not None:
        console.print(f"page     {escape(str(page))}", highlight=False, soft_wrap=True)


def _print_table(
    console: Console, title: str, letters: Sequence[str], rows: Mapping[str, Sequence[str]]
) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for column in ("", *letters):
        table.add_column(column, overflow="fold")
    for label, cells in rows.items():
        table.add_row(*map(escape, (label, *cells)))
    console.print(table)
