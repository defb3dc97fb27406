"""A recipe that starts from another recipe's run: found where it is finished, made first where it is not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from finetune.recipe.discovery import load_stage
from finetune.recipe.recipe import Recipe, load
from finetune.recipe.start import is_recipe
from finetune.training.run_directory import RunDirectory
from finetune.training.run_fingerprint import run_fingerprint


def ready(recipe: Recipe, console: Console) -> Recipe:
    """Return the recipe with a finished run as its start.

    Args:
        recipe: its ``model.start`` may be ``stage/recipe``; that recipe's run is found by its digest.
        console: where the run that comes first shows its progress.

    Raises:
        UserError: mistakes in the recipe that comes first, or in its data.
        Interrupted: a signal came while it ran.
        NotFiniteError: its loss or gradient became NaN or infinite.
    """
    start = recipe.settings.model.start
    if start is None or not is_recipe(start):
        return recipe
    stage, _, name = start.partition("/")
    first = ready(load(stage, name), console)
    run = RunDirectory.open(first, run_fingerprint(first.settings), force=False)
    if run.finished:
        _say(console, f"starts from {run.path} ({start})")
    else:
        _say(console, f"starts from {run.path}, the run of {start}: it is not finished, and runs first")
        load_stage(stage).run(first, console, command=f"llm-align {stage} {name}")
        _say(console, f"{run.path} is finished; now {recipe.stage} {recipe.name}")
    return _starting_from(run.path, recipe)


def _starting_from(run: Path, recipe: Recipe) -> Recipe:
    """Return the recipe with a run as its start; a run of full tuning becomes its base."""
    update: dict[str, Any] = {"start": str(run)}
    if (run / "model").is_dir():
        update |= {"base": str(run), "revision": None, "rope": None}
    model = recipe.settings.model.model_copy(update=update)
    return replace(recipe, settings=recipe.settings.model_copy(update={"model": model}))


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
