"""Stages of a pipeline: parsed from its file with command-line overrides, and loaded as recipes."""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.pipeline.file import REWARDS_KEY, StageEntrySettings
from align.rl.rewards.run_info import pending_reward_recipes
from finetune.recipe import yaml_file
from finetune.recipe.command_line import COMMAND_LINE
from finetune.recipe.discovery import find_recipe, stage_names, verb_of
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.parent_run import SCORING_STAGES
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.recipe import Recipe, read_recipe, stage_settings
from finetune.recipe.renamed import renamed_stage
from finetune.recipe.yaml_file import LineNumbers
from finetune.training.stored_rows import copy_rows, row_sources, rows_file

STAGE_NAME = re.compile(r"[A-Za-z][\w-]*")
ORDER_REPAIR = "stages run in file order: move it above this one"
INIT_FROM_KEY, BASE_KEY = "model.init_from", "model.base"


@dataclass(frozen=True)
class StageEntry:
    """One stage of a pipeline.

    Attributes:
        name: name in the pipeline.
        stage: the stage that runs it (sft, dpo, ...).
        recipe: name or path of the recipe.
        init_from: name of the pipeline stage to initialize from; None starts from a base model.
        rewards: names of the pipeline stages that provide the reward models.
        overrides: overrides of the recipe's settings, by ``section.key``.
        origins: origin (file and line) of each override, also of ``model.init_from`` and ``rewards.sources``.
    """

    name: str
    stage: str
    recipe: str
    init_from: str | None = None
    rewards: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return ``stage/recipe``, or stage and path of a recipe file."""
        return f"{self.stage} {self.recipe}" if "/" in self.recipe else f"{self.stage}/{self.recipe}"

    @property
    def is_reward_model(self) -> bool:
        """Return whether its model is a reward model."""
        return self.stage in SCORING_STAGES

    @property
    def takes_rewards(self) -> bool:
        """Return whether the stage optimizes rewards."""
        section, key = REWARDS_KEY.split(".")
        sections = stage_settings(self.stage).model_fields
        return section in sections and key in sections[section].annotation.model_fields  # type: ignore[union-attr]

    def load(
        self,
        *,
        init_from: str | None,
        rewards: Mapping[str, str],
        pending: Mapping[str, Recipe] | None = None,
    ) -> Recipe:
        """Load the recipe with the pipeline's overrides.

        Args:
            init_from: value of ``model.init_from``; None leaves the recipe's.
            rewards: the run of each name in ``rewards``.
            pending: recipes that have not run yet, by the names used in ``init_from`` and ``rewards``.

        Raises:
            UserError: all problems found, each prefixed with the stage's name.
        """
        shortcuts = self._shortcuts(init_from, rewards)
        try:
            with pending_reward_recipes(pending or {}):
                recipe = read_recipe(self.stage, self.recipe, shortcuts=shortcuts, pending=pending)
        except UserError as error:
            raise UserError([self.with_stage_name(problem) for problem in error.problems]) from error
        return replace(recipe, origins={**recipe.origins, **dict(self._origins(recipe))})

    def with_rows_of(self, recipe: Recipe | None) -> "StageEntry":
        """Return the stage with the recipe's snapshots in place of rows that were given in Python."""
        if recipe is None:
            return self
        rows = dict(row_sources(recipe.settings))
        overrides = {
            key: _with_rows(value, key, lambda key, value: rows.get(key, value))
            for key, value in self.overrides.items()
        }
        return replace(self, overrides=overrides)

    def with_stored_rows(self, folder: Path) -> "StageEntry":
        """Write rows that were given in Python into a folder; return the stage with their files."""

        def stored(key: str, value: Any) -> Any:
            file = folder / rows_file(f"{self.name}.{key}")
            return str(copy_rows(value, file)) if isinstance(value, PythonRows) else value

        overrides = {key: _with_rows(value, key, stored) for key, value in self.overrides.items()}
        return replace(self, overrides=overrides)

    def with_stage_name(self, problem: Problem) -> Problem:
        """Prefix a problem with the stage's name, and replace its origin by the pipeline's line."""
        where = problem.where
        # An error may pass here twice: when the recipe is loaded, and when the stage fails.
        if where.startswith(f"stage {self.name}: "):
            return problem
        key = where.removesuffix(f" ({COMMAND_LINE})").strip("'")
        if key != where.strip("'"):
            origin = next(
                (self.origins[setting] for setting in self.origins if key.startswith(setting)), COMMAND_LINE
            )
            where = where.replace(f"({COMMAND_LINE})", f"({origin})")
        return replace(problem, where=f"stage {self.name}: {where}")

    def command(self, *, init_from: str | None, rewards: Mapping[str, str]) -> str:
        """Return the command line of the same run outside the pipeline."""
        arguments = [
            "llm-align",
            verb_of(self.stage),
            self.recipe,
            *(["--from", init_from] if init_from else []),
        ]
        shortcuts = self._shortcuts(None, rewards)
        return shlex.join([*arguments, *(f"{key}={_cli_value(value)}" for key, value in shortcuts.items())])

    def _shortcuts(self, init_from: str | None, rewards: Mapping[str, str]) -> dict[str, Any]:
        sources = [_reward_source(name, rewards[name], is_only_reward=len(rewards) == 1) for name in rewards]
        return {
            **({INIT_FROM_KEY: init_from} if init_from is not None else {}),
            **({REWARDS_KEY: sources} if sources else {}),
            **self.overrides,
        }

    def _origins(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Yield the settings overridden by the pipeline file or the command line, with their origins."""
        for dotted, origin in self.origins.items():
            key = ".".join(dotted.split(".")[:2])
            # The recipe got the overrides as if from the command line, which is their origin there.
            if recipe.origins.get(key) == COMMAND_LINE:
                yield key, origin


def _with_rows(value: Any, key: str, replaced: Callable[[str, Any], Any]) -> Any:
    """Return an override with another value for each source of rows in it."""
    value = replaced(key, value)
    if isinstance(value, list):
        return [_with_rows(item, f"{key}[{index}]", replaced) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {name: _with_rows(item, f"{key}.{name}", replaced) for name, item in value.items()}
    return value


def _reward_source(name: str, run: str, *, is_only_reward: bool) -> dict[str, str]:
    """Return an entry of `rewards.sources`; a single reward keeps its default name."""
    return {"run": run} if is_only_reward else {"run": run, "name": name}


def _cli_value(value: Any) -> str:
    """Return a value as a command-line argument, which is parsed as YAML."""
    needs_no_quotes = isinstance(value, str) and yaml_file.parse_scalar(value) == value
    return str(value) if needs_no_quotes else json.dumps(value, ensure_ascii=False, default=str)


def parse_entries(
    section: str,
    stages: Mapping[str, StageEntrySettings],
    *,
    file: str,
    line_numbers: LineNumbers,
    overrides: Mapping[str, Any],
) -> tuple[list[StageEntry], list[Problem]]:
    """Return the stages in order, and the problems that can be found without loading their recipes.

    Args:
        section: ``stages`` or ``public``.
        stages: the file's settings of each stage.
        file: name of the file.
        line_numbers: line numbers of its keys.
        overrides: ``stage.section.key`` -> value, from the command line or from Python.
    """
    locations = {".".join(key): f"{file}:{line_number}" for key, line_number in line_numbers.items()}
    problems = [
        *_name_problems(section, stages),
        *_reference_problems(section, stages),
        *_override_problems(stages, overrides),
    ]
    entries = []
    for name, settings in stages.items():
        try:
            stage, recipe = _parse_recipe_reference(f"{section}.{name}.recipe", settings.recipe)
        except UserError as error:
            # The other stages are still checked: all problems are reported at once.
            problems += error.problems
            continue
        file_overrides, origins = _entry_overrides(settings, f"{section}.{name}", locations)
        cli_overrides = {
            key.partition(".")[2]: value for key, value in overrides.items() if key.startswith(f"{name}.")
        }
        problems += _conflicting_overrides(f"{section}.{name}", settings, [*file_overrides, *cli_overrides])
        origins |= dict.fromkeys(cli_overrides, COMMAND_LINE)
        rewards = tuple(settings.rewards)
        entries.append(
            StageEntry(
                name, stage, recipe, settings.init_from, rewards, {**file_overrides, **cli_overrides}, origins
            )
        )
    problems += _reward_problems(section, entries)
    return entries, [problem.with_origin(locations) for problem in problems]


def _name_problems(section: str, stages: Mapping[str, StageEntrySettings]) -> Iterator[Problem]:
    for name in stages:
        if not STAGE_NAME.fullmatch(name):
            expected = "letters, digits, - and _, starting with a letter (used in STAGE.section.key=value)"
            yield Problem(f"{section}.{name}", "not a valid stage name", expected)


def _reference_problems(section: str, stages: Mapping[str, StageEntrySettings]) -> Iterator[Problem]:
    """Yield a problem for each reference to an unknown or later stage."""
    names = list(stages)
    for index, (name, settings) in enumerate(stages.items()):
        references = [("from", settings.init_from), *(("reward", reward) for reward in settings.rewards)]
        for key, target in references:
            where = f"{section}.{name}.{key}"
            if target is None or target in names[:index]:
                continue
            expected = (
                f"{one_of(names[:index])}, above it" if index else "no reference: it is the first stage"
            )
            if target not in names:
                yield Problem(where, f"unknown stage '{target}'", expected, did_you_mean(target, names))
            elif cycle := _reference_cycle(name, stages):
                path = " -> ".join(cycle)
                yield Problem(where, f"a cycle: {path}", expected, "remove one of these references")
            else:
                yield Problem(where, f"'{target}' comes later", expected, ORDER_REPAIR)
        if len(set(settings.rewards)) < len(settings.rewards):
            yield Problem(f"{section}.{name}.reward", "duplicate stages", "each stage once")


def _reference_cycle(name: str, stages: Mapping[str, StageEntrySettings]) -> list[str]:
    """Return a cycle of references through a stage; empty if there is none."""
    paths = [[name]]
    seen = {name}
    while paths:
        path = paths.pop()
        settings = stages.get(path[-1])
        for target in [settings.init_from, *settings.rewards] if settings else []:
            if target == name:
                return [*path, name]
            if target is not None and target not in seen:
                seen.add(target)
                paths.append([*path, target])
    return []


def _override_problems(
    stages: Mapping[str, StageEntrySettings], overrides: Mapping[str, Any]
) -> Iterator[Problem]:
    for key in overrides:
        name = key.split(".")[0]
        if key.count(".") < 2:
            expected = f"STAGE.section.key=value, as in {next(iter(stages))}.train.epochs=3"
            yield Problem(f"'{key}' ({COMMAND_LINE})", "invalid override", expected)
        elif name not in stages:
            where = f"{key} ({COMMAND_LINE})"
            yield Problem(where, f"unknown stage '{name}'", one_of(stages), did_you_mean(name, stages))


def _parse_recipe_reference(where: str, text: str) -> tuple[str, str]:
    """Return stage and recipe of ``stage/recipe``, or of a recipe file with a ``stage`` key.

    Raises:
        UserError: unknown stage or recipe.
    """
    stages = list(stage_names())
    if text.endswith((".yaml", ".yml")):
        return _stage_of(where, Path(text).expanduser()), text
    stage, slash, name = text.partition("/")
    if not slash or not name:
        expected = "stage/recipe, as in sft/quickstart, or the path of a .yaml file"
        repair = f"{text}/quickstart" if text in stages else did_you_mean(text, stages)
        raise UserError(Problem(where, f"'{text}'", expected, repair))
    if stage not in stages:
        actual = renamed_stage(stage) or f"'{text}': unknown stage '{stage}'"
        raise UserError(Problem(where, actual, one_of(stages), did_you_mean(stage, stages)))
    try:
        find_recipe(stage, name)
    except UserError as error:
        (problem,) = error.problems
        raise UserError(
            Problem(where, f"'{text}': {problem.actual}", problem.expected, problem.repair)
        ) from error
    return stage, name


def _stage_of(where: str, path: Path) -> str:
    """Return the `stage` of a recipe file."""
    if not path.is_file():
        raise UserError(Problem(where, f"'{path}': no such file", "a recipe's YAML file, or stage/recipe"))
    stage = yaml_file.read_yaml(path)[0].get("stage")
    if not isinstance(stage, str) or stage not in stage_names():
        actual = f"'{path}' has no `stage`" if stage is None else f"'{path}' has stage '{stage}'"
        expected = f"stage: {one_of(stage_names())}"
        raise UserError(Problem(where, actual, expected, f"add e.g. `stage: sft` to {path}"))
    return stage


def _entry_overrides(
    settings: StageEntrySettings, where: str, locations: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of ``set`` and their origins by ``section.key``; a section may be a mapping."""
    overrides: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in settings.overrides.items():
        section_overrides = (
            {f"{key}.{name}": item for name, item in value.items()} if _is_section(key, value) else {}
        )
        overrides |= section_overrides or {key: value}
        origins |= dict.fromkeys(section_overrides or [key], locations[f"{where}.set.{key}"])
    if settings.init_from is not None:
        origins[INIT_FROM_KEY] = locations[f"{where}.from"]
    if settings.reward is not None:
        origins[REWARDS_KEY] = locations[f"{where}.reward"]
    return overrides, origins


def _is_section(key: str, value: Any) -> bool:
    return "." not in key and isinstance(value, dict) and bool(value)


def _conflicting_overrides(
    where: str, settings: StageEntrySettings, overrides: list[str]
) -> Iterator[Problem]:
    """Yield a problem for each override that conflicts with the pipeline's keys `from` and `reward`."""
    for key, pipeline_value, pipeline_key in [
        (INIT_FROM_KEY, settings.init_from, "from"),
        (REWARDS_KEY, settings.reward, "reward"),
    ]:
        if key in overrides and pipeline_value is not None:
            yield Problem(
                f"{where}.{pipeline_key}", f"conflicts with {key}", "one of the two", f"remove {key}"
            )
    if BASE_KEY in overrides and settings.init_from is not None:
        expected = f"the base of '{settings.init_from}'"
        yield Problem(f"{where}.from", f"conflicts with {BASE_KEY}", expected, f"remove {BASE_KEY}")


def _reward_problems(section: str, entries: list[StageEntry]) -> Iterator[Problem]:
    """Yield a problem for rewards of a stage that takes none, and for a reward from a policy's stage."""
    trains_reward_model = {entry.name: entry.is_reward_model for entry in entries}
    for entry in entries:
        where = f"{section}.{entry.name}.reward"
        if entry.rewards and not entry.takes_rewards:
            actual = f"set, but stage {entry.stage} does not use rewards"
            yield Problem(where, actual, "no reward", "remove it")
        for name in entry.rewards:
            # Names that do not exist are reported by `_reference_problems`.
            if not trains_reward_model.get(name, True):
                yield Problem(where, f"'{name}' is not a reward model", "a stage that trains a reward model")
