"""Terminal output of ``llm-align list`` and ``llm-align show``."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from align.pipeline.file import pipeline_descriptions
from align.preference.losses.catalog import all_losses
from finetune.evaluation.suites import suite_descriptions
from finetune.recipe.bases import load_bases
from finetune.recipe.checkpoint_folder import describe_steps
from finetune.recipe.console import Terminal
from finetune.recipe.differences import differing_settings
from finetune.recipe.discovery import ADAPTERS, TEMPLATES, plugin_names, plugin_summary, stage_names
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import RECIPE_FILE, ListedRun, list_runs
from finetune.recipe.schema import recipe_descriptions, setting_rows
from finetune.recipe.yaml_file import format_value, read_yaml
from finetune.training.metrics import metric_lines

NO_RESULTS = ("trained parameters", "steps", "rounds", "training", "training loss", "peak memory")
"""Entries of a summary that are no headline."""
SEED = "train.seed"
MAX_DIFFERENCES = 4
"""Settings in which the line of a run differs from those of its recipe's other runs; `compare` has all."""
ON_REQUEST = ("metrics",)
"""Kinds that `llm-align list` shows when they are named."""


def names_by_kind(kinds: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """Return the names of some kinds, each with a one-line description; of all kinds by default."""
    return {kind: LISTINGS[kind]() for kind in kinds or LISTINGS}


def _recipes() -> dict[str, str]:
    names = {stage: recipe_descriptions(stage) for stage in stage_names()}
    return {f"{stage} {name}": line for stage, lines in names.items() for name, line in lines.items()}


def _bases() -> dict[str, str]:
    return {
        name: "  ".join(filter(None, (base.id, base.parameters, base.note)))
        for name, base in load_bases().items()
    }


def _summaries(package: str) -> dict[str, str]:
    return {name: plugin_summary(package, name) for name in plugin_names(package)}


LISTINGS: dict[str, Callable[[], dict[str, str]]] = {
    "stages": lambda: {name: plugin_summary(package, name) for name, package in stage_names().items()},
    "recipes": _recipes,
    "pipelines": pipeline_descriptions,
    "adapters": lambda: _summaries(ADAPTERS),
    "templates": lambda: _summaries(TEMPLATES),
    "losses": lambda: {loss.name: loss.summary for loss in all_losses().values()},
    "metrics": metric_lines,
    "bases": _bases,
    "suites": suite_descriptions,
    "runs": lambda: _run_lines(list_runs()),
}
"""What lists each kind; a kind that is not asked for is not read."""


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


def _run_lines(runs: Sequence[ListedRun]) -> dict[str, str]:
    """Return a line for each run; runs of one recipe show the settings in which they differ."""
    recipes: dict[tuple[str, str], list[ListedRun]] = {}
    for run in runs:
        if not run.damage:
            key = str(run.record.get("stage", "")), str(run.record["recipe"])
            recipes.setdefault(key, []).append(run)
    differences = {path: text for group in recipes.values() for path, text in _differences(group).items()}
    return {str(run.path): _run_line(run, differences.get(run.path, "")) for run in runs}


def _differences(runs: Sequence[ListedRun]) -> dict[Path, str]:
    """Return the settings of each run in which the runs of a recipe differ, seeds first."""
    files = {run.path: run.path / RECIPE_FILE for run in runs if (run.path / RECIPE_FILE).is_file()}
    if len(files) < 2:
        return {}
    different = differing_settings([read_yaml(file)[0] for file in files.values()])
    # The line has the base and the data already; the parent's path is not part of what a run is.
    keys = [key for key in different if key not in ("model.base", "data.source", "model.init_from")]
    keys.sort(key=lambda key: key != SEED)
    keys, more = keys[:MAX_DIFFERENCES], len(keys) - MAX_DIFFERENCES
    rest = f" and {more} more" if more > 0 else ""
    return {
        path: ", ".join(f"{key}={format_value(different[key][index])}" for key in keys) + rest
        for index, path in enumerate(files)
    }


def _run_line(run: ListedRun, differences: str = "") -> str:
    """Return a run's status, start, headline, base and data, or what is wrong with it.

    Args:
        run: the run.
        differences: its settings that other runs of its recipe do not share.
    """
    if run.damage:
        return f"damaged: {run.damage}"
    record = run.record
    base = record.get("reload", {}).get("model", {}).get("base", "")
    sources = [str(source["source"]) for source in record.get("data", {}).get("sources", [])]
    status = str(record["status"])
    if early := record.get("finished_early"):
        status += f" at {early['unit']} {describe_steps(record)}"
    shown = [status, str(record.get("started", "")), _headline(record.get("summary", {}))]
    has_seed = "seed" in record and SEED not in differences
    shown += [f"seed {record['seed']}" if has_seed else "", differences]
    shown += [f"base {base}" if base else "", f"data {' + '.join(sources)}" if sources else ""]
    return ", ".join(filter(None, shown))


def _headline(summary: Mapping[str, str]) -> str:
    """Return the last result of a run's summary: an eval, or the held-out metric."""
    results = [f"{name} {value}" for name, value in summary.items() if name not in NO_RESULTS]
    return results[-1] if results else ""
