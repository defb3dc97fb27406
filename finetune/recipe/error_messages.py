"""Convert pydantic validation errors to problems: where, value found, values accepted, repair."""

from typing import Any, TypeGuard

from pydantic import BaseModel, ValidationError

from finetune.recipe import yaml_file
from finetune.recipe.errors import Problem, SettingError, did_you_mean, one_of
from finetune.recipe.foreign_names import foreign_problem
from finetune.recipe.renamed import renamed_key, renamed_value
from finetune.recipe.settings import StageSettings

Schema = dict[str, Any]
"""A JSON schema, as pydantic generates it for a section."""

BOOLEAN_WORDS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
NULL_WORDS = ("none", "None", "nil", "-")
LARGEST_NAMED_BOUND = 100_000
"""Larger bounds are limits of number formats: only the message about a value beyond one names it."""


def validation_problems(
    section: str,
    error: ValidationError,
    *,
    model: type[BaseModel],
    stage: type[StageSettings] | None = None,
) -> list[Problem]:
    """Return the problems of a section, one per value, although pydantic reports one per type of a union.

    Args:
        section: its name.
        error: pydantic's report on it.
        model: its settings.
        stage: the settings of its stage; None if it is not a section of a recipe.
    """
    # The schema has what pydantic's errors lack: descriptions, choices and bounds.
    root = model.model_json_schema()
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        where, schema = _resolve_location(section, detail["loc"], root=root)
        if isinstance(setting_error := detail.get("ctx", {}).get("error"), SettingError):
            problems[where] = setting_error.problem(where)
        elif where not in problems:
            problems[where] = _to_problem(where, detail, schema=schema, root=root, stage=stage)
    # A value of the wrong type is one mistake, and not one more for each key inside it.
    return [problem for where, problem in problems.items() if not _inside_another(where, problems)]


def describe_expected(schema: Schema, root: Schema) -> str:
    """Describe the accepted values of a setting: ``an integer above 0, or auto``."""
    descriptions = [_describe_option(option, root) for option in _schema_options(schema, root)]
    return ", or ".join(dict.fromkeys(descriptions))


def _inside_another(where: str, others: dict[str, Problem]) -> bool:
    return any(where.startswith((f"{other}[", f"{other}.")) for other in others)


def _resolve_location(section: str, location: tuple[int | str, ...], *, root: Schema) -> tuple[str, Schema]:
    """Resolve an error's location in the schema, skipping pydantic's names of union members."""
    where, schema = section, root
    # A location such as ("held_out", "constrained-int") names the union's type last: not a key of the recipe.
    for part in location:
        for option in _schema_options(schema, root):
            if isinstance(part, int) and "items" in option:
                where, schema = f"{where}[{part}]", option["items"]
                break
            if isinstance(part, str) and _is_object_key(option, part):
                where = f"{where}.{part}"
                schema = option.get("properties", {}).get(part) or option.get("additionalProperties") or {}
                break
    return where, schema if isinstance(schema, dict) else {}


def _is_object_key(option: Schema, key: str) -> bool:
    """Return True if ``key`` is a key of an object, and not pydantic's name of a type of a union."""
    return option.get("type") == "object" and not key.startswith(
        ("list[", "dict[", "literal[", "constrained-")
    )


def _schema_options(schema: Schema, root: Schema) -> list[Schema]:
    if "$ref" in schema:
        return _schema_options(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    if "anyOf" in schema:
        return [resolved for option in schema["anyOf"] for resolved in _schema_options(option, root)]
    return [schema]


def _to_problem(
    where: str, detail: Any, *, schema: Schema, root: Schema, stage: type[StageSettings] | None
) -> Problem:
    key = where.rsplit(".", 1)[-1]
    if detail["type"] == "extra_forbidden":
        return _unknown_key(where, detail["input"], _sibling_keys(detail["loc"], root), stage=stage)
    expected = describe_expected(schema, root)
    if limit := _limit_exceeded(detail):
        expected = f"{expected}, {limit}"
    about = schema.get("description", "")
    expected = f"{expected} ({about})" if about else expected
    if detail["type"] == "missing":
        return Problem(where, "missing", expected)
    value = detail["input"]
    # The text of a validator of our own says more than the type.
    if isinstance(reason := detail.get("ctx", {}).get("error"), ValueError):
        return Problem(where, f"found {_describe_value(value)}: {reason}", expected)
    repair = renamed_value(where, value) or _suggest_repair(key, value, options=_schema_options(schema, root))
    return Problem(where, f"found {_describe_value(value)}", expected, repair)


def _unknown_key(where: str, value: Any, keys: list[str], *, stage: type[StageSettings] | None) -> Problem:
    section, _, key = where.rpartition(".")
    if renamed := renamed_key(where, value, keys):
        return renamed
    if stage is not None:
        section = section.split(".")[0]
        foreign = foreign_problem(where, key, value, expected=one_of(keys), section=section, schema=stage)
        if foreign is not None:
            return foreign
    return Problem(where, "unknown key", one_of(keys), did_you_mean(key, keys))


def _limit_exceeded(detail: Any) -> str:
    """Return the limit of a number format that a value exceeds; empty if it exceeds none."""
    for name, words in (("le", "at most"), ("ge", "at least")):
        bound = detail.get("ctx", {}).get(name, 0)
        if abs(bound) > LARGEST_NAMED_BOUND:
            return f"{words} {bound:,}" if isinstance(bound, int) else f"{words} {bound:g}"
    return ""


def _sibling_keys(location: tuple[int | str, ...], root: Schema) -> list[str]:
    _, schema = _resolve_location("", location[:-1], root=root)
    return [name for option in _schema_options(schema, root) for name in option.get("properties", {})]


def _describe_value(value: Any) -> str:
    if isinstance(value, str):
        return "an empty string" if not value else f"the string {yaml_file.format_value(value)}"
    return yaml_file.format_value(value)


def _suggest_repair(key: str, value: Any, *, options: list[Schema]) -> str:
    """Suggest what to write instead, if the mistake is a common one."""
    kinds = {option.get("type") for option in options}
    if isinstance(value, str) and value:
        return _suggest_text_repair(key, value, options=options, kinds=kinds)
    # YAML reads an unquoted revision such as 2 as a number.
    if _is_number(value) and kinds <= {"string", "null"}:
        return f'put it in quotes: {key}: "{value}"'
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds:
        return f"write {int(value)}"
    return ""


def _suggest_text_repair(key: str, value: str, *, options: list[Schema], kinds: set[str | None]) -> str:
    # YAML 1.1 habits: yes, no, on and off are strings in YAML 1.2.
    if "boolean" in kinds and value.lower() in BOOLEAN_WORDS:
        return f"write {BOOLEAN_WORDS[value.lower()]}"
    if "null" in kinds and value in NULL_WORDS:
        return f"write {key}: null"
    if kinds & {"integer", "number"} and _is_number(yaml_file.parse_scalar(value)):
        return "write it without quotes"
    choices = [choice for option in options for choice in _option_choices(option)]
    if suggestion := did_you_mean(value, choices):
        return suggestion
    return f"write a list in brackets: {key}: [{value}]" if "array" in kinds else ""


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _option_choices(option: Schema) -> list[str]:
    if "const" in option:
        const = option["const"]
        return [const if isinstance(const, str) else yaml_file.format_value(const)]
    choices: list[str] = option.get("enum", [])
    return choices


def _describe_option(option: Schema, root: Schema) -> str:
    if choices := _option_choices(option):
        return one_of(choices)
    kind = option.get("type")
    if kind in ("integer", "number"):
        return _describe_number("an integer" if kind == "integer" else "a number", option)
    if kind == "array":
        return _describe_list(option, root)
    if kind == "object":
        keys = option.get("properties")
        return f"a mapping with the keys {', '.join(keys)}" if keys else "a mapping such as {name: value}"
    return {"string": "a string", "boolean": "true or false", "null": "null"}.get(str(kind), "another value")


def _describe_number(noun: str, option: Schema) -> str:
    names = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    low, above, high, below = (_named_bound(option, name) for name in names)
    if high is not None:
        return (
            f"{noun} above {above} and at most {high}"
            if above is not None
            else f"{noun} from {low} to {high}"
        )
    if below is not None:
        if above is not None:
            return f"{noun} above {above} and below {below}"
        return f"{noun} from {low} up to, but not including, {below}"
    if above is not None:
        return f"{noun} above {above}"
    return f"{noun}, {low} or more" if low is not None else noun


def _named_bound(option: Schema, name: str) -> str | None:
    bound = option.get(name)
    return None if bound is None or abs(bound) > LARGEST_NAMED_BOUND else f"{bound:g}"


def _describe_list(option: Schema, root: Schema) -> str:
    item = describe_expected(option["items"], root)
    length = option.get("minItems") if option.get("minItems") == option.get("maxItems") else None
    return f"a list of {length} entries, each {item}" if length else f"a list with each entry {item}"
