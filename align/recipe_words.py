"""Parse command-line arguments to a recipe: its name and SECTION.KEY=VALUE overrides."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from align.default_recipe import default_recipe
from finetune.recipe.recipe import Recipe, read_recipe


def recipe_from_arguments(
    stage: str, arguments: tuple[str, ...], shortcuts: dict[str, Any], out: Path | None = None
) -> Recipe:
    """Load the recipe of command-line arguments: the one without ``=`` is its name, the others are overrides.

    Args:
        stage: the stage of the recipe.
        arguments: ``RECIPE`` and ``section.key=value``.
        shortcuts: values of --base, --data and other options, by recipe key.
        out: the run directory.

    Raises:
        UsageError: more than one name.
        UserError: invalid recipe.
    """
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise click.UsageError(
            f"expected one RECIPE, found {', '.join(names)}; overrides are SECTION.KEY=VALUE"
        )
    overrides = [argument for argument in arguments if "=" in argument]
    name, notes = (names[0], []) if names else default_recipe(stage, shortcuts)
    recipe = read_recipe(stage, name, shortcuts=shortcuts, overrides=overrides, out=out)
    return replace(recipe, notes=[*notes, *recipe.notes])
