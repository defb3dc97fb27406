"""Arguments that several commands take: RECIPE and SECTION.KEY=VALUE with a recipe's options, and RUN."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import click

from align.cli.completion import (
    complete_adapter,
    complete_base,
    complete_file,
    complete_parent,
    complete_reward,
    complete_stage,
    complete_words,
)
from align.default_recipe import default_recipe
from align.rl.rewards.settings import has_rewards_section
from finetune.recipe import yaml_file
from finetune.recipe.discovery import stage_names, stage_of_verb, verb_of
from finetune.recipe.errors import Problem
from finetune.recipe.foreign_names import foreign_problem
from finetune.recipe.recipe import Recipe, read_recipe, stage_settings
from finetune.recipe.recipe_name import DEFAULT_STAGE, is_override, resolve_name
from finetune.recipe.runs import find_run
from finetune.recipe.settings import StageSettings
from finetune.recipe.terminal import command_line, echo

Command = Callable[..., None]
METAVAR = "[RECIPE] [SECTION.KEY=VALUE]..."
STAGE_METAVAR = "[[STAGE/]RECIPE] [SECTION.KEY=VALUE]..."
STAGE_HELP = "Stage of the recipe; default: that of RECIPE, or sft."
FROM_HELP = "Parent run: run directory, name or prefix; or STAGE/RECIPE, which runs first if needed."
REWARD_HELP = "Reward: a finished reward run, reward/RECIPE, file.py:function, or a grader's name."


@dataclass(frozen=True)
class RecipeArguments:
    """The recipe of a command line: its name, its overrides and its options.

    Attributes:
        words: ``RECIPE`` and ``section.key=value``.
        stage: the stage of the command or of --stage; None: that of the recipe.
        options: values of --base, --data and the others, by flag.
    """

    words: tuple[str, ...]
    stage: str | None
    options: Mapping[str, str]

    def resolve_stage(self) -> tuple[str, str]:
        """Return the stage, and the recipe's name or path, "" without one.

        Raises:
            UsageError: more than one name.
            UserError: the recipe is of another stage, or several stages have one of this name.
        """
        names = [word for word in self.words if is_recipe_word(word)]
        if len(names) > 1:
            raise click.UsageError(
                f"expected one RECIPE, found {', '.join(names)}; overrides are SECTION.KEY=VALUE, "
                "with quotes around a value that has spaces"
            )
        return resolve_name(names[0], stage=self.stage) if names else (self.stage or DEFAULT_STAGE, "")

    def load(self, *, out: Path | None = None, settings: Mapping[str, Any] | None = None) -> Recipe:
        """Load the recipe.

        Args:
            out: the run directory.
            settings: values of further options, by recipe key.

        Raises:
            UsageError: more than one name.
            UserError: invalid recipe.
        """
        shortcuts = {OPTION_KEYS[flag]: value for flag, value in self.options.items()}
        shortcuts |= dict(settings or {})
        stage, name = self.resolve_stage()
        name, notes = (name, []) if name else default_recipe(stage, shortcuts)
        overrides = [word for word in self.words if not is_recipe_word(word)]
        recipe = read_recipe(stage, name, shortcuts=shortcuts, overrides=overrides, out=out)
        return replace(recipe, notes=[*notes, *recipe.notes])

    def command(self, *further: str) -> str:
        """Return the command line that runs the recipe, with further arguments."""
        stage, name = self.resolve_stage()
        words = [name if is_recipe_word(word) else word for word in self.words]
        options = [word for option in self.options.items() for word in option]
        return command_line(verb_of(stage), *words, *options, *further)


OPTIONS = {
    "--base": ("base", "B", complete_base, "Base model: short name, Hub id or folder."),
    "--data": ("data", "D", complete_file, "Data: Hub id, file or folder."),
    "--adapter": ("adapter", "A", complete_adapter, "Adapter (see `llm-align list adapters`)."),
    "--from": ("init_from", "RUN", complete_parent, FROM_HELP),
    "--reward": ("reward", "RUN", complete_reward, REWARD_HELP),
}
"""Options of a recipe: parameter, metavar, completion and help."""
OPTION_KEYS = {
    "--base": "model.base",
    "--data": "data.source",
    "--adapter": "adapter.method",
    "--from": "model.init_from",
    "--reward": "rewards.sources",
}


def _stage_of_option(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else stage_of_verb(value)


_STAGE_OPTION = click.option(
    "--stage", metavar="S", callback=_stage_of_option, shell_complete=complete_stage, help=STAGE_HELP
)


def recipe_arguments(*, stage: str | None = None) -> Callable[[Command], Command]:
    """Add the arguments of a recipe to a command, which receives them as its first parameter.

    Args:
        stage: the stage of the command's recipes; None: of any, with the option --stage.
    """
    flags = [flag for flag in OPTIONS if flag != "--reward" or stage is None or has_rewards_section(stage)]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_recipe(words: tuple[str, ...], **parameters: Any) -> None:
            given = {flag: parameters.pop(OPTIONS[flag][0]) for flag in flags}
            options = {flag: value for flag, value in given.items() if value is not None}
            command(RecipeArguments(words, stage or parameters.pop("stage"), options), **parameters)

        decorated: Command = with_recipe
        for flag in reversed(flags):
            name, metavar, complete, text = OPTIONS[flag]
            option = click.option(flag, name, metavar=metavar, shell_complete=complete, help=text)
            decorated = option(decorated)
        if stage is None:
            decorated = _STAGE_OPTION(decorated)
        metavar = METAVAR if stage else STAGE_METAVAR
        return click.argument("words", nargs=-1, metavar=metavar, shell_complete=complete_words)(decorated)

    return decorate


def is_recipe_word(word: str) -> bool:
    """Return True for the name of a recipe, False for ``section.key=value``."""
    # A folder may be called lr=1e-4.
    return not is_override(word)


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


def foreign_options(error: click.NoSuchOption, words: Sequence[str]) -> list[Problem]:
    """Return the problems of options that are keys of a recipe, or of another library; [] if none is.

    Args:
        error: click's error on the first of them.
        words: the words of the command line.
    """
    command = error.ctx.command if error.ctx is not None else None
    if command is None or not any(parameter.name == "words" for parameter in command.params):
        return []
    stage = stage_of_verb(command.name or "")
    schema = stage_settings(stage if stage in stage_names() else DEFAULT_STAGE)
    known = {option for parameter in command.params for option in parameter.opts}
    problems = []
    for index, word in enumerate(words):
        option, equals, text = word.partition("=")
        if not option.startswith("--") or option in known:
            continue
        following = words[index + 1] if index + 1 < len(words) else ""
        # `--bf16` is a flag, `--lr 1e-4` and `--lr=1e-4` have a value.
        text = text if equals else "true" if not following or following.startswith("-") else following
        name, value = option.removeprefix("--"), yaml_file.parse_scalar(text)
        expected = f"an option of `llm-align {command.name} --help`, or section.key=value"
        section, _, key = name.rpartition(".")
        if _has_key(schema, section, key):
            repair = shlex.quote(f"{name}={text}")
            problems.append(Problem(option, "a recipe key is written without dashes", expected, repair))
        elif foreign := foreign_problem(option, name, value, expected=expected, schema=schema):
            problems.append(foreign)
    return problems


def _has_key(schema: type[StageSettings], section: str, key: str) -> bool:
    field = schema.model_fields.get(section)
    return field is not None and key in field.annotation.model_fields  # type: ignore[union-attr]
