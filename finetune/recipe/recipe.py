"""A recipe: YAML, shortcuts and overrides in; typed settings with every value's origin out, or every mistake at once."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.recipe import yaml_file
from finetune.recipe.checks import contradictions
from finetune.recipe.discovery import find_recipe, load_plugin, plugin_names
from finetune.recipe.errors import Problem, UserError, nearest, one_of
from finetune.recipe.settings import AdapterSettings, StageSettings

Values = dict[str, dict[str, Any]]
Origins = dict[str, str]
COMMAND_LINE = "command line"
ADAPTERS = "finetune.adapters"


@dataclass(frozen=True)
class Recipe:
    """What a stage runs: typed settings, where each value came from, and where the result goes."""

    stage: str
    name: str
    description: str
    settings: StageSettings
    origins: Origins
    out: Path | None = None
    notes: list[str] = field(default_factory=list)

    def values(self) -> Values:
        """Return all settings as plain sections; rows given in Python are summed up, not repeated."""
        content = self.settings.model_dump(mode="json")
        rows = content["data"]["source"]
        if isinstance(rows, list):
            content["data"]["source"] = f"<{len(rows)} rows given in Python, {_sha(rows)[:16]}>"
        return content

    def digest(self, data_fingerprint: str) -> str:
        """Return 8 hex digits that name the run: same settings and same data, same name."""
        return _sha([self.stage, self.values(), data_fingerprint])[:8]

    def to_yaml(self, derived: dict[str, str] | None = None) -> str:
        """Return the resolved recipe; each value has its origin behind it, ``derived`` ones the planner's choice."""
        keys = {key: origin for key, origin in self.origins.items() if "." in key}
        comments = {(key.split(".")[0], key.split(".", 1)[1]): origin for key, origin in keys.items()}
        for key, choice in (derived or {}).items():
            section, name = key.split(".", 1)
            comments[section, name] += f"; planner: {choice}"
        head = {"stage": self.stage, "description": self.description}
        return yaml_file.write({**head, **self.values()}, comments)


def load(
    stage: str,
    name: str,
    *,
    shortcuts: dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
) -> Recipe:
    """Load a recipe.

    Args:
        stage: the stage that will run it, a file of a ``stages/`` folder.
        name: a recipe's name, or the path of a YAML file.
        shortcuts: ``{"model.base": "tiny"}``: what --base, --data and --adapter set.
        overrides: ``section.key=value`` words of the command line.
        out: the run directory, where the user wants another than the usual one.

    Raises:
        UserError: with every mistake that could be found.
    """
    path = find_recipe(stage, name)
    content, lines = yaml_file.read(path)
    origins = {".".join(key): f"{path.name}:{line}" for key, line in lines.items()}
    schema = stage_settings(stage)
    values, problems = _sections(content, stage, schema, path, lines)
    notes = _override(values, origins, {**(shortcuts or {}), **_parse(overrides, problems)}, schema, problems)
    sections = _validate(values, origins, schema, problems)
    settings = schema(**sections)
    problems += contradictions(settings, sections)
    if problems:
        raise UserError(problems)
    complete = {
        f"{section}.{key}": origins.get(f"{section}.{key}", "default")
        for section, keys in settings.model_dump().items()
        for key in keys
    }
    return Recipe(stage, path.stem, str(content.get("description", "")), settings, complete, out, notes)


def stage_settings(stage: str) -> type[StageSettings]:
    """Return the schema of a stage's recipe, declared in the stage's own file."""
    package = "finetune.stages" if stage in plugin_names("finetune.stages") else "align.stages"
    schema: type[StageSettings] = load_plugin(package, stage, where="stage").Settings
    return schema


def adapter_settings(method: str) -> type[AdapterSettings]:
    """Return the settings that an adapter declares in its own file."""
    schema: type[AdapterSettings] = load_plugin(ADAPTERS, method, where="adapter.method").Settings
    return schema


def _sections(
    content: dict[str, Any], stage: str, schema: type[StageSettings], path: Path, lines: yaml_file.Lines
) -> tuple[Values, list[Problem]]:
    """Split a file's content into sections; tell keys that are no section."""
    problems = []
    values: Values = {}
    sections = schema.model_fields
    for key, value in content.items():
        where = f"{path}:{lines[(key,)]} {key}"
        if key == "stage":
            if value != stage:
                repair = f"llm-align {value} {path}" if isinstance(value, str) else ""
                problems.append(Problem(where, f"the recipe is for stage '{value}'", f"stage '{stage}'", repair))
        elif key == "description":
            continue
        elif key not in sections:
            known = ["stage", "description", *sections]
            problems.append(Problem(where, "unknown section", one_of(known), nearest(key, known)))
        elif not isinstance(value, dict):
            found = f"{value!r}" if value is not None else "nothing below it"
            problems.append(Problem(where, f"found {found}", f"a section with keys ({', '.join(_keys(sections[key]))})"))
        else:
            values[key] = dict(value)
    return values, problems


def _keys(section: Any) -> list[str]:
    return list(section.annotation.model_fields)


def _parse(overrides: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    parsed = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or key.count(".") != 1 or not all(key.split(".")):
            problems.append(Problem(f"'{word}'", "not understood", "section.key=value, as in train.epochs=3"))
        else:
            parsed[key] = yaml_file.scalar(text)
    return parsed


def _override(
    values: Values, origins: Origins, words: dict[str, Any], schema: type[StageSettings], problems: list[Problem]
) -> list[str]:
    """Lay the command line's values over the recipe's; return notes on recipe values that no longer apply."""
    notes = []
    for dotted, value in words.items():
        section, key = dotted.split(".", 1)
        if section not in schema.model_fields:
            sections = list(schema.model_fields)
            hint = nearest(section, sections)
            problems.append(Problem(f"{dotted} (command line)", "unknown section", one_of(sections), hint))
            continue
        values.setdefault(section, {})[key] = value
        origins[dotted] = COMMAND_LINE
    for dropped in [*_dropped_adapter_keys(values, origins), *_dropped_data_keys(values, origins)]:
        section, key = dropped.split(".")
        notes.append(f"{dropped}={values[section].pop(key)} of the recipe does not apply any more and is left out")
        origins.pop(dropped)
    return notes


def _dropped_adapter_keys(values: Values, origins: Origins) -> list[str]:
    """Return the recipe's adapter keys that a method chosen on the command line does not have."""
    method = values.get("adapter", {}).get("method")
    if origins.get("adapter.method") != COMMAND_LINE or method not in plugin_names(ADAPTERS):
        return []
    known = adapter_settings(method).model_fields
    keys = [f"adapter.{key}" for key in values["adapter"] if key not in known]
    return [key for key in keys if origins[key] != COMMAND_LINE]


def _dropped_data_keys(values: Values, origins: Origins) -> list[str]:
    """Return the recipe's data keys that speak of the source which the command line replaces."""
    if origins.get("data.source") != COMMAND_LINE:
        return []
    data = values["data"]
    keys = ["mix", "revision", "split", "columns"] + (["held_out"] if isinstance(data.get("held_out"), str) else [])
    return [f"data.{key}" for key in keys if key in data and origins[f"data.{key}"] != COMMAND_LINE]


def _validate(
    values: Values, origins: Origins, schema: type[StageSettings], problems: list[Problem]
) -> dict[str, Any]:
    """Return the sections that are in order, typed; put what is wrong with the others into ``problems``."""
    sections: dict[str, BaseModel] = {}
    for name, field_info in schema.model_fields.items():
        given = values.get(name, {})
        section: Any = field_info.annotation
        try:
            if name == "adapter":
                section = adapter_settings(_method(given))
            sections[name] = section.model_validate(given)
        except UserError as error:
            problems += error.problems
        except ValidationError as error:
            problems += _problems(name, error, section, origins)
    return sections


def _method(adapter: dict[str, Any]) -> str:
    return str(adapter.get("method", AdapterSettings().method))


def _problems(section: str, error: ValidationError, schema: type[BaseModel], origins: Origins) -> list[Problem]:
    """Turn pydantic's errors into ours, one a key however many types were tried."""
    by_key: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(str(detail["loc"][0]), []).append(detail)
    return [_problem(section, key, details, schema, origins) for key, details in by_key.items()]


def _problem(
    section: str, key: str, details: list[Any], schema: type[BaseModel], origins: Origins
) -> Problem:
    where = f"{section}.{key} ({origins.get(f'{section}.{key}', 'default')})"
    first = details[0]
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        keys = list(schema.model_fields)
        return Problem(where, "unknown key", one_of(keys), nearest(key, keys))
    wanted = dict.fromkeys(detail["msg"].removeprefix("Input should be ").removeprefix("a valid ") for detail in details)
    described = schema.model_fields[key].description if key in schema.model_fields else ""
    inside = ".".join(str(part) for part in first["loc"][1:2] if isinstance(part, int))
    found = f"found {first['input']!r}" + (f" (entry {int(inside) + 1})" if inside else "")
    return Problem(where, found, " or ".join(wanted), f"{key}: {described}" if described else "")


def _sha(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
