"""The words of a command line as a recipe: its name, and what it is told beside."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from align.default_recipe import default_recipe
from finetune.recipe.recipe import Recipe, load


def recipe_of_words(
    stage: str, words: tuple[str, ...], shortcuts: dict[str, Any], out: Path | None = None
) -> Recipe:
    """Return the recipe that words mean: the first one without ``=`` is its name, the others are settings.

    Args:
        stage: the stage that runs it, or for which it is planned.
        words: ``RECIPE`` and ``section.key=value``.
        shortcuts: what --base, --data and their like set.
        out: the run directory.

    Raises:
        UsageError: several names.
        UserError: mistakes in the recipe.
    """
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise click.UsageError(
            f"one RECIPE is expected, found {', '.join(names)}; settings are SECTION.KEY=VALUE"
        )
    overrides = [word for word in words if "=" in word]
    name, notes = (names[0], []) if names else default_recipe(stage, shortcuts)
    recipe = load(stage, name, shortcuts=shortcuts, overrides=overrides, out=out)
    return replace(recipe, notes=[*notes, *recipe.notes])
