"""Parse the stages of a pipeline file with command-line overrides; reports all problems at once."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.pipeline.entry import BASE, START, Entry
from align.pipeline.settings import REWARDS, EntrySettings
from finetune.recipe import yaml_file
from finetune.recipe.command_line import COMMAND_LINE
from finetune.recipe.discovery import find_recipe, stage_names
from finetune.recipe.errors import Problem, UserError, nearest, one_of
from finetune.recipe.yaml_file import Lines

NAME = re.compile(r"[A-Za-z][\w-]*")
LATER = "stages run in file order: move it above this one"


def entries_of(
    section: str, found: Mapping[str, EntrySettings], *, file: str, lines: Lines, changes: Mapping[str, Any]
) -> tuple[list[Entry], list[Problem]]:
    """Return the stages in order, and the problems that can be found without loading their recipes.

    Args:
        section: ``stages`` or ``public``.
        stages: the file's settings of each stage.
        file: name of the file.
        line_numbers: line numbers of its keys.
        overrides: ``stage.section.key`` -> value, from the command line or from Python.
    """
    places = {".".join(key): f"{file}:{line}" for key, line in lines.items()}
    problems = [*_names(section, found), *_references(section, found), *_changes(found, changes)]
    entries = []
    for name, settings in found.items():
        try:
            stage, recipe = _split(f"{section}.{name}.recipe", settings.recipe)
        except UserError as error:
            problems += error.problems
            continue
        given, origins = _given(settings, f"{section}.{name}", places)
        mine = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith(f"{name}.")}
        problems += _taken(f"{section}.{name}", settings, [*given, *mine])
        origins |= dict.fromkeys(mine, COMMAND_LINE)
        rewards = tuple(settings.rewards)
        entries.append(Entry(name, stage, recipe, settings.start, rewards, {**given, **mine}, origins))
    problems += _kinds(section, entries)
    return entries, [problem.placed(places) for problem in problems]


def _names(section: str, found: Mapping[str, EntrySettings]) -> Iterator[Problem]:
    for name in found:
        if not NAME.fullmatch(name):
            expected = "letters, digits, - and _, starting with a letter (used in STAGE.section.key=value)"
            yield Problem(f"{section}.{name}", "not a valid stage name", expected)


def _references(section: str, found: Mapping[str, EntrySettings]) -> Iterator[Problem]:
    """Yield references to unknown or later stages."""
    names = list(found)
    for number, (name, settings) in enumerate(found.items()):
        named = [("from", settings.start), *(("reward", reward) for reward in settings.rewards)]
        for key, other in named:
            where = f"{section}.{name}.{key}"
            if other is None or other in names[:number]:
                continue
            expected = (
                f"{one_of(names[:number])}, above it" if number else "no reference: it is the first stage"
            )
            if other not in names:
                yield Problem(where, f"unknown stage '{other}'", expected, nearest(other, names))
            elif circle := _circle(name, found):
                way = " -> ".join(circle)
                yield Problem(where, f"a cycle: {way}", expected, "remove one of these references")
            else:
                yield Problem(where, f"'{other}' comes later", expected, LATER)
        if len(set(settings.rewards)) < len(settings.rewards):
            yield Problem(f"{section}.{name}.reward", "duplicate stages", "each stage once")


def _circle(name: str, found: Mapping[str, EntrySettings]) -> list[str]:
    """Return a cycle of references through a stage; empty if there is none."""
    ways = [[name]]
    seen = {name}
    while ways:
        way = ways.pop()
        settings = found.get(way[-1])
        for other in [settings.start, *settings.rewards] if settings else []:
            if other == name:
                return [*way, name]
            if other is not None and other not in seen:
                seen.add(other)
                ways.append([*way, other])
    return []


def _changes(found: Mapping[str, EntrySettings], changes: Mapping[str, Any]) -> Iterator[Problem]:
    for key in changes:
        name = key.split(".")[0]
        if key.count(".") < 2:
            expected = f"STAGE.section.key=value, as in {next(iter(found))}.train.epochs=3"
            yield Problem(f"'{key}' ({COMMAND_LINE})", "invalid override", expected)
        elif name not in found:
            where = f"{key} ({COMMAND_LINE})"
            yield Problem(where, f"unknown stage '{name}'", one_of(found), nearest(name, found))


def _split(where: str, text: str) -> tuple[str, str]:
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
        repair = f"{text}/quickstart" if text in stages else nearest(text, stages)
        raise UserError(Problem(where, f"'{text}'", expected, repair))
    if stage not in stages:
        found = f"'{text}': unknown stage '{stage}'"
        raise UserError(Problem(where, found, one_of(stages), nearest(stage, stages)))
    try:
        find_recipe(stage, name)
    except UserError as error:
        (told,) = error.problems
        raise UserError(Problem(where, f"'{text}': {told.found}", told.expected, told.repair)) from error
    return stage, name


def _stage_of(where: str, path: Path) -> str:
    """Return the `stage` of a recipe file."""
    if not path.is_file():
        raise UserError(Problem(where, f"'{path}': no such file", "a recipe's YAML file, or stage/recipe"))
    stage = yaml_file.read(path)[0].get("stage")
    if not isinstance(stage, str) or stage not in stage_names():
        found = f"'{path}' has no `stage`" if stage is None else f"'{path}' has stage '{stage}'"
        expected = f"stage: {one_of(stage_names())}"
        raise UserError(Problem(where, found, expected, f"add e.g. `stage: sft` to {path}"))
    return stage


def _given(
    settings: EntrySettings, where: str, places: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of ``set`` and their origins by ``section.key``; a section may be a mapping."""
    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in settings.given.items():
        inner = {f"{key}.{name}": part for name, part in value.items()} if _section(key, value) else {}
        given |= inner or {key: value}
        origins |= dict.fromkeys(inner or [key], places[f"{where}.set.{key}"])
    if settings.start is not None:
        origins[START] = places[f"{where}.from"]
    if settings.reward is not None:
        origins[REWARDS] = places[f"{where}.reward"]
    return given, origins


def _section(key: str, value: Any) -> bool:
    return "." not in key and isinstance(value, dict) and bool(value)


def _taken(where: str, settings: EntrySettings, given: list[str]) -> Iterator[Problem]:
    """Yield overrides that conflict with the pipeline's own keys `from` and `reward`."""
    for key, named, word in [(START, settings.start, "from"), (REWARDS, settings.reward, "reward")]:
        if key in given and named is not None:
            yield Problem(f"{where}.{word}", f"conflicts with {key}", "one of the two", f"remove {key}")
    if BASE in given and settings.start is not None:
        expected = f"the base of '{settings.start}'"
        yield Problem(f"{where}.from", f"conflicts with {BASE}", expected, f"remove {BASE}")


def _kinds(section: str, entries: list[Entry]) -> Iterator[Problem]:
    """Yield rewards of stages that take none, and rewards from stages that are no reward models."""
    scores = {entry.name: entry.scores for entry in entries}
    for entry in entries:
        where = f"{section}.{entry.name}.reward"
        if entry.rewards and not entry.takes_rewards:
            found = f"set, but stage {entry.stage} takes no rewards"
            yield Problem(where, found, "no reward", "remove it")
        for name in entry.rewards:
            if not scores.get(name, True):
                yield Problem(where, f"'{name}' is not a reward model", "a stage that trains a reward model")
