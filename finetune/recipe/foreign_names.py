"""Names of other libraries' settings, and what is here instead: the data are in foreign_names.yaml.

The arguments of transformers' Trainer and of TRL's configs are in engine_arguments.py.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finetune.recipe import yaml_file
from finetune.recipe.engine_arguments import (
    TRAINING_ARGUMENTS,
    TRL_ARGUMENTS,
    Argument,
    ByRecipe,
    Passed,
    Refused,
)
from finetune.recipe.errors import Problem
from finetune.recipe.settings import StageSettings

TABLE = Path(__file__).with_suffix(".yaml")
CONVERSIONS, VALUES = "conversions", "values"
DECIDED = "has no key here"
NONE = "has no counterpart here"
REASONS = {"decided": DECIDED, "none": NONE}
REMOVE = "remove it"


@dataclass(frozen=True, slots=True)
class Counterpart:
    """What a name of another library is here.

    Attributes:
        keys: our keys, of which a stage may have some only; --out is one too.
        reason: where there is no key, what decides it or why there is none; starts with DECIDED or NONE.
    """

    keys: tuple[str, ...] = ()
    reason: str = ""

    def __or__(self, other: "Counterpart") -> "Counterpart":
        """Return what a name is that two libraries have."""
        return Counterpart(tuple(dict.fromkeys(self.keys + other.keys)), self.reason or other.reason)


@cache
def _table() -> Mapping[str, Any]:
    content, _ = yaml_file.read_yaml(TABLE)
    return content


@cache
def libraries() -> dict[str, dict[str, Counterpart]]:
    """Return the names of each library with their counterparts."""
    tables = {
        name: dict(_read_library(content))
        for name, content in _table().items()
        if name not in (CONVERSIONS, VALUES)
    }
    arguments = {"transformers": [TRAINING_ARGUMENTS], "TRL": list(TRL_ARGUMENTS.values())}
    for library, engines in arguments.items():
        for name, argument in (item for engine in engines for item in engine.items()):
            tables[library][name] = _of_argument(name, argument) | tables[library].get(name, Counterpart())
    return tables


def _read_library(content: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, Counterpart]]:
    entries: dict[str, Counterpart] = {}
    for keys, names in content["keys"].items():
        for name in names.split():
            entries[name] = entries.get(name, Counterpart()) | Counterpart(tuple(keys.split()))
    for kind, words in REASONS.items():
        for reason, names in content.get(kind, {}).items():
            entries |= {name: Counterpart(reason=f"{words}: {reason}") for name in names.split()}
    yield from entries.items()


def _of_argument(name: str, argument: Argument) -> Counterpart:
    match argument:
        case ByRecipe(key):
            return Counterpart((key,))
        case Passed():
            return Counterpart((f"train.engine_args.{name}",))
        case Refused(reason):
            return Counterpart(reason=f"{NONE}: {reason}")


def conversion_tables() -> Mapping[str, Mapping[str, Any]]:
    """Return what to write where a value cannot be carried over: notes by name, and values by name."""
    return {name: _table()[name] for name in (CONVERSIONS, VALUES)}


@cache
def counterparts() -> dict[str, Counterpart]:
    """Return every name with its counterpart, over all libraries."""
    entries: dict[str, Counterpart] = {}
    for names in libraries().values():
        for name, counterpart in names.items():
            entries[name] = entries.get(name, Counterpart()) | counterpart
    return entries


def foreign_problem(
    where: str,
    name: str,
    value: Any,
    *,
    expected: str,
    section: str = "",
    schema: type[StageSettings] = StageSettings,
) -> Problem | None:
    """Return the problem of a key that another library has, or another section; None for any other.

    Args:
        where: the key as the user wrote it.
        name: its last part; dashes count as underscores.
        value: its value; None if it is not known.
        expected: what the place allows, if the name has no key here.
        section: the section in which it was written; "" for none.
        schema: the settings of the stage.
    """
    plain = name.replace("-", "_")
    counterpart = counterparts().get(plain, Counterpart())
    keys = list(_keys_of_sections(plain, schema) or counterpart.keys)
    here = [key for key in keys if _exists(key, schema)]
    here = [key for key in here if key.startswith(f"{section}.")] or here
    # dpo.loss.beta alone, and not dpo.loss too.
    here = [key for key in here if not any(other.startswith(f"{key}.") for other in here)]
    if here:
        actual = f"`{name}` is {_or(here)} here"
        return Problem(where, actual, _describe(here, schema), conversion(plain, value, here))
    if keys:
        return Problem(where, f"`{name}` is {_or(keys)}, which this stage does not have", expected, REMOVE)
    if counterpart.reason:
        return Problem(where, f"`{name}` {counterpart.reason}", expected, REMOVE)
    return None


def foreign_stage(name: Any) -> str:
    """Return our name of another library's stage; "" for any other."""
    return str(_table()[VALUES]["stage"].get(name, "")) if isinstance(name, str) else ""


def conversion(name: str, value: Any, keys: list[str]) -> str:
    """Return what to write in place of a name and its value; "" if that is not known."""
    values, note = _table()[VALUES].get(name), _table()[CONVERSIONS].get(name, "")
    if values is not None:
        return str(values.get(str(value), note))
    if note or len(keys) > 1 or value is None or isinstance(value, dict):
        return str(note)
    if keys[0].startswith("--"):
        return f"{keys[0]} {shlex.quote(str(value))}"
    text = value if isinstance(value, str) else yaml_file.format_value(value)
    return shlex.quote(f"{keys[0]}={text}")


def _keys_of_sections(name: str, schema: type[StageSettings]) -> tuple[str, ...]:
    """Return our own keys of a name that was written in another section, or in none."""
    sections = schema.model_fields.items()
    return tuple(f"{section}.{name}" for section, field in sections if name in _fields(field.annotation))


def _fields(section: Any) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = section.model_fields
    return fields


def _exists(key: str, schema: type[StageSettings]) -> bool:
    section, _, inner = key.partition(".")
    if section.startswith("--"):
        return True
    field = schema.model_fields.get(section)
    # An adapter's keys are those of its method, which a value may change.
    return field is not None and (section == "adapter" or inner.split(".")[0] in _fields(field.annotation))


def _describe(keys: list[str], schema: type[StageSettings]) -> str:
    if len(keys) > 1 or keys[0].startswith("--"):
        return " or ".join(keys)
    section, name, *inner = keys[0].split(".")
    field = _fields(schema.model_fields[section].annotation).get(name)
    about = field.description if field is not None and not inner else ""
    return f"{keys[0]} ({about})" if about else keys[0]


def _or(keys: list[str]) -> str:
    return " or ".join(f"`{key}`" for key in keys)
