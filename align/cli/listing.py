"""Terminal output of ``llm-align list`` and ``llm-align show``."""

import json
from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from align.pipeline.file import pipeline_descriptions
from align.preference.losses.catalog import all_losses
from finetune.recipe.console import Terminal
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import RUNS_FOLDER
from finetune.recipe.schema import list_names, setting_rows
from finetune.training.metrics import metric_lines

ON_REQUEST = ("metrics",)
"""Kinds that `llm-align list` shows when they are named."""


def names_by_kind() -> dict[str, dict[str, str]]:
    """Return all names by kind, each with a one-line description."""
    listed = list_names()
    recipes = {
        f"{stage} {name}": line for stage, names in listed.recipes.items() for name, line in names.items()
    }
    bases = {
        name: "  ".join(filter(None, (base.id, base.parameters, base.note)))
        for name, base in listed.bases.items()
    }
    return {
        "stages": listed.stages,
        "recipes": recipes,
        "pipelines": pipeline_descriptions(),
        "adapters": listed.adapters,
        "templates": listed.templates,
        "losses": {loss.name: loss.summary for loss in all_losses().values()},
        "metrics": metric_lines(),
        "bases": bases,
        "runs": {
            str(path): _run_status(path)
            for path in sorted(RUNS_FOLDER.glob("*/"))
            if (path / "run.json").is_file()
        },
    }


def print_listing(kinds: Mapping[str, Mapping[str, str]]) -> None:
    """Print names by kind as a table."""
    console = Terminal()
    for kind, names in kinds.items():
        table = Table(title=kind, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(no_wrap=True, style="cyan")
        table.add_column(overflow="fold")
        for name, line in names.items():
            table.add_row(escape(name), escape(line))
        console.print(table)
        if not names:
            console.print(f"  no {kind} yet")


def print_recipe(recipe: Recipe) -> None:
    """Print every value of a recipe with its origin."""
    console = Terminal()
    console.print(
        f"[bold]{recipe.stage} {escape(recipe.name)}[/]  {escape(recipe.description)}", highlight=False
    )
    table = Table(box=None)
    for column in ("setting", "value", "origin"):
        table.add_column(column, overflow="fold")
    for key, value, origin in setting_rows(recipe):
        style = "dim" if origin == "default" else ""
        table.add_row(escape(key), escape(json.dumps(value, ensure_ascii=False)), escape(origin), style=style)
    console.print(table)
    for note in recipe.notes:
        console.print(escape(note), highlight=False)


def _run_status(path: Path) -> str:
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    return f"{record['status']}, {record['started']}"
