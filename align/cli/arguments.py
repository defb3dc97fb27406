"""Arguments that several commands take: RECIPE and SECTION.KEY=VALUE, --stage, --from, RUN."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from align.default_recipe import default_recipe
from finetune.recipe.discovery import stage_names, stage_of_verb, verb_of
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.recipe.runs import find_run
from finetune.recipe.terminal import echo

FROM_HELP = "Parent run: run directory, name or prefix; or STAGE/RECIPE, which runs first if needed."
STAGE_HELP = "Stage of the recipe."


def stage_option(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Return the stage that --stage names, by its name or by its command."""
    return stage_of_verb(value)


def run_argument(context: click.Context, parameter: click.Parameter, value: str) -> Path:
    """Return the folder of the finished run that RUN names: its folder, its name in ./runs or a prefix.

    Raises:
        UserError: there is no such run, or it is not finished.
    """
    # While a command line is completed, the run may be half a name.
    if context.resilient_parsing:
        return Path(value or "")
    folder, note = find_run(value, where="RUN", recipes=False)
    if note:
        echo(note, err=True)
    return folder


def split_stage(stage: str, arguments: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return the stage and the arguments with ``STAGE/RECIPE`` replaced by ``RECIPE``.

    Args:
        stage: the command's stage, or the value of --stage.
        arguments: ``RECIPE`` or ``STAGE/RECIPE``, and ``section.key=value``.

    Raises:
        UserError: the recipe is of another stage than the user chose.
    """
    source = click.get_current_context().get_parameter_source("stage")
    words = list(arguments)
    for index, word in enumerate(words):
        verb, slash, name = word.partition("/")
        recipe_stage = stage_of_verb(verb)
        is_path = word.endswith((".yaml", ".yml")) or Path(word).exists()
        if not slash or "=" in word or is_path or recipe_stage not in stage_names():
            continue
        # Only a default of --stage gives way to the recipe's stage.
        if recipe_stage != stage and source is not ParameterSource.DEFAULT:
            actual, repair = f"a recipe of stage {recipe_stage}", f"llm-align {verb_of(recipe_stage)} {name}"
            raise UserError(Problem(word, actual, f"a recipe of stage {stage}", repair))
        stage, words[index] = recipe_stage, name
    return stage, tuple(words)


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
            f"expected one RECIPE, found {', '.join(names)}; overrides are SECTION.KEY=VALUE, "
            "with quotes around a value that has spaces"
        )
    overrides = [argument for argument in arguments if "=" in argument]
    name, notes = (names[0], []) if names else default_recipe(stage, shortcuts)
    recipe = read_recipe(stage, name, shortcuts=shortcuts, overrides=overrides, out=out)
    return replace(recipe, notes=[*notes, *recipe.notes])
