"""Arguments that several commands take: RECIPE and SECTION.KEY=VALUE, --stage, --from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from align.default_recipe import default_recipe
from finetune.recipe.discovery import stage_of_verb
from finetune.recipe.recipe import Recipe, read_recipe

FROM_HELP = "Finished run to start from: folder, name or prefix; or STAGE/RECIPE, which runs first if needed."
STAGE_HELP = "Stage of the recipe."


def stage_option(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Return the stage that --stage names, by its name or by its verb."""
    return stage_of_verb(value)


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
