"""What the user calls a recipe: its name, stage/name, a YAML file, or a run with its resolved recipe."""

import os
from pathlib import Path

from finetune.recipe import yaml_file
from finetune.recipe.checkpoint_folder import run_of_checkpoint
from finetune.recipe.discovery import find_recipe, recipe_names, stage_names, stage_of_verb, verb_of
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import RECIPE_FILE, RUNS_FOLDER, find_run, read_run_record
from finetune.recipe.terminal import command_line

DEFAULT_STAGE = "sft"
"""Stage of a name that does not say one."""
DEFAULT_NAME = "default"


def resolve_name(text: str, *, stage: str | None = None) -> tuple[str, str]:
    """Return the stage of a recipe, and its name or the path of its file, "" for the stage's default recipe.

    Args:
        text: ``name``, ``stage/name``, ``stage`` or ``stage/default``, the path of a YAML file, or a run: its
            folder, its name or a prefix.
        stage: the stage that the user chose; None: that of the recipe.

    Raises:
        UserError: the recipe is of another stage than the chosen one, or several stages have one so called.
    """
    if (run := _run_folder(text)) is not None:
        record = read_run_record(run)
        recipe_stage, name = str(record.get("stage")), str(run / RECIPE_FILE)
        _check_stage(text, recipe_stage, stage, f"a run of stage {recipe_stage}", text)
        return recipe_stage, name
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        return stage or _stage_of_file(text), text
    verb, slash, name = text.partition("/")
    recipe_stage = stage_of_verb(verb)
    if slash and recipe_stage in stage_names() and not Path(text).exists():
        _check_stage(text, recipe_stage, stage, f"a recipe of stage {recipe_stage}", name)
        return recipe_stage, "" if name == DEFAULT_NAME and name not in recipe_names(recipe_stage) else name
    if stage is None and recipe_stage in stage_names() and text not in recipe_names(DEFAULT_STAGE):
        return recipe_stage, ""
    return stage or _stage_of_name(text), text


def _run_folder(text: str) -> Path | None:
    """Return the run that a text names: its folder, its name, or, where no recipe is so called, a prefix."""
    for folder in (Path(text).expanduser(), RUNS_FOLDER / text):
        if (folder / "run.json").is_file():
            return folder
    is_recipe = "/" in text or "." in text or any(text in recipe_names(stage) for stage in stage_names())
    if is_recipe or not any(RUNS_FOLDER.glob(f"{text}*/run.json")):
        return None
    run, _ = find_run(text)
    return run_of_checkpoint(run) or run


def _check_stage(text: str, recipe_stage: str, stage: str | None, actual: str, name: str) -> None:
    if stage not in (None, recipe_stage):
        raise UserError(
            Problem(text, actual, f"a recipe of stage {stage}", command_line(verb_of(recipe_stage), name))
        )


def _stage_of_file(text: str) -> str:
    """Return the ``stage`` of a recipe file, the default one if it names none that there is."""
    path = find_recipe(DEFAULT_STAGE, text)
    stage = yaml_file.read_yaml(path)[0].get("stage")
    return stage if isinstance(stage, str) and stage in stage_names() else DEFAULT_STAGE


def _stage_of_name(name: str) -> str:
    """Return the only stage with a recipe of this name, or the default one."""
    stages = [stage for stage in stage_names() if name in recipe_names(stage)]
    if DEFAULT_STAGE in stages or not stages:
        return DEFAULT_STAGE
    if len(stages) > 1:
        expected = f"one of {', '.join(f'{verb_of(stage)}/{name}' for stage in stages)}"
        raise UserError(
            Problem(f"recipe '{name}'", f"{len(stages)} stages have one", expected, "write STAGE/RECIPE")
        )
    return stages[0]


def is_override(word: str) -> bool:
    """Return True for ``section.key=value``; a recipe's path may have a ``=`` too."""
    key, equals, _ = word.partition("=")
    # Not Path.is_file: a long value is no file name, and raises.
    if not equals or os.path.isfile(os.path.expanduser(word)):
        return False
    # No setting's key has a slash or lacks its section: this is the path of a file that does not exist.
    return not (word.endswith((".yaml", ".yml")) and ("/" in key or "." not in key))
