"""Every number of a recipe has a range: values outside of it are refused with a message, never later."""

import re
from collections.abc import Iterator
from math import inf, nan
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from finetune.recipe.discovery import ADAPTERS, adapter_settings, plugin_names, stage_names
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem
from finetune.recipe.recipe import stage_settings

LOWER, UPPER = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
NEVER_NUMBERS: tuple[Any, ...] = (nan, inf, True, "x", [], {}, 10**400, 1e31)
"""Values that no number of a recipe may have; some keys also take a text or a list."""
EXTREMES: tuple[Any, ...] = (-(2**40), 0, 1.5, 1e30, 2**40)


def section_models() -> list[type[BaseModel]]:
    """Return all sections of all stages and adapters, and the models inside them."""
    models = [adapter_settings(name) for name in plugin_names(ADAPTERS)]
    models += [
        model
        for stage in stage_names()
        for field in stage_settings(stage).model_fields.values()
        for model in _models(field.annotation)
    ]
    return list(dict.fromkeys(models))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _models(field.annotation)
    for argument in get_args(annotation):
        yield from _models(argument)


def options(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the types that a key takes, and those of its list's entries."""
    for option in schema.get("anyOf", [schema]):
        yield option
        if "items" in option:
            yield from options(option["items"])


def numeric_keys(model: type[BaseModel]) -> dict[str, list[dict[str, Any]]]:
    """Return the keys that take a number, with the types of each."""
    keys = {
        key: list(options(schema)) for key, schema in model.model_json_schema().get("properties", {}).items()
    }
    return {
        key: types
        for key, types in keys.items()
        if any(option.get("type") in ("integer", "number") for option in types)
    }


MODELS = section_models()


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    unbounded = [
        f"{model.__module__}.{model.__name__}.{key}"
        for model in MODELS
        for key, types in numeric_keys(model).items()
        for option in types
        if option.get("type") in ("integer", "number")
        and not (option.keys() & LOWER and option.keys() & UPPER)
    ]
    assert unbounded == []
    assert sum(len(numeric_keys(model)) for model in MODELS) > 150


def test_a_value_out_of_range_is_refused_with_a_message() -> None:
    checked: list[tuple[str, list[dict[str, Any]]]] = []
    for model in MODELS:
        # Sections of several stages share most keys.
        keys = {key: types for key, types in numeric_keys(model).items() if (key, types) not in checked}
        checked += keys.items()
        for value in (*NEVER_NUMBERS, *EXTREMES):
            check_value(model, keys, value)


def check_value(model: type[BaseModel], keys: dict[str, list[dict[str, Any]]], value: Any) -> None:
    """Check that each key refuses the value with a message, or accepts an extreme one."""
    tried = {
        key
        for key, types in keys.items()
        if not (
            isinstance(value, str | list) and {option.get("type") for option in types} & {"string", "array"}
        )
    }
    problems = problems_of(model, dict.fromkeys(tried, value))
    refused = {key for key in tried if any(re.match(rf"section.{key}\b", where) for where in problems)}
    assert [problem for problem in problems.values() if not problem.expected] == []
    is_extreme = not isinstance(value, bool) and any(value == extreme for extreme in EXTREMES)
    assert is_extreme or refused == tried, (model, value, tried - refused)


def problems_of(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Problem]:
    """Return the problems of a section's values, by location."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        problems = validation_problems("section", error, model=model)
        return {problem.where: problem for problem in problems if problem.actual != "missing"}
    return {}


def test_the_message_names_a_limit_only_if_the_value_exceeds_it() -> None:
    train = stage_settings("sft").model_fields["train"].annotation
    assert train is not None
    beyond = problems_of(train, {"max_steps": 2**40, "seed": 5_000_000_000, "learning_rate": 1e40})
    assert "at most 2,147,483,647" in beyond["section.max_steps"].expected
    assert "at most 4,294,967,295" in beyond["section.seed"].expected
    assert "at most 1e+30" in beyond["section.learning_rate"].expected
    assert "at most" not in problems_of(train, {"max_steps": -1})["section.max_steps"].expected
    [rank] = problems_of(adapter_settings("lora"), {"rank": 10**6}).values()
    assert "an integer above 0 and at most 65536" in rank.expected
