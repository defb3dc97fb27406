"""Rows as JSON: text, numbers, true, false, null, lists and objects; what JSON lacks is refused.

And how pydantic treats objects that are given in Python for keys of a recipe: rows, functions.
"""

import json
import sys
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from math import isfinite, isnan
from typing import Any
from uuid import UUID

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

STORED = "text, numbers, booleans, None, lists or dicts of them"
MISSING = ("<NA>", "NaT")
"""How pandas prints its missing values."""


def instance_schema(cls: type, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Return pydantic's schema of a class: its objects are valid, and are written as their text."""
    # In a union, pydantic asks for numbers of a subclass of int too.
    as_text = core_schema.plain_serializer_function_ser_schema(
        lambda value: str(value) if isinstance(value, cls) else value, when_used="json"
    )
    return core_schema.is_instance_schema(cls, serialization=as_text)


def text_json_schema(cls: type, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    """Return the JSON schema of such a class: a recipe file names its objects by a text."""
    return {"type": "string"}


class ValueNotStoredError(Exception):
    """A value that JSON cannot hold; ``path`` leads to it: ``messages[0].content``."""

    def __init__(self, path: str, actual: str, expected: str = STORED, *, is_foreign: bool = False) -> None:
        super().__init__(actual)
        self.path, self.actual, self.expected, self.is_foreign = path, actual, expected, is_foreign

    @property
    def column(self) -> str:
        """Return the column that holds the value."""
        return self.path.partition("[")[0].partition(".")[0]


def encode_row(row: Mapping[Any, Any]) -> bytes:
    """Return a row as a line of JSON, its columns in alphabetical order.

    Raises:
        ValueNotStoredError: JSON has no such value, or a name is not text.
    """
    values = {_column_name(name): value for name, value in row.items()}
    content = {name: plain_value(values[name], name) for name in sorted(values)}
    try:
        text = json.dumps(content, ensure_ascii=False)
    except ValueError as error:
        limit = sys.get_int_max_str_digits()
        name = next((name for name in content if not _is_json(content[name])), "")
        actual, expected = f"a number of more than {limit} digits", "a shorter number, or text"
        raise ValueNotStoredError(name, actual, expected) from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        # A lone surrogate: readers refuse it in a text, with the row's location.
        return json.dumps(content).encode() + b"\n"


def plain_value(value: Any, path: str) -> Any:
    """Return a value as JSON data; NaN, NaT and NA are missing values, dates are ISO text.

    Raises:
        ValueNotStoredError: JSON has no such value.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not isfinite(value) and not isnan(value):
            raise ValueNotStoredError(path, f"found {value}", "a finite number")
        return None if isnan(value) else float(value)
    if isinstance(value, Mapping):
        return {_key(key, path): plain_value(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if type(value).__module__ == "numpy":
        # As a Python object, a date of NumPy is a number of nanoseconds.
        is_date = type(value).__name__ in ("datetime64", "timedelta64")
        return _text(value) if is_date else plain_value(value.tolist(), path)
    if isinstance(value, (date, time)):
        return _text(value.isoformat())
    if isinstance(value, (timedelta, Decimal, UUID)) or str(value) == MISSING[0]:
        return _text(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    raise ValueNotStoredError(path, f"found a value of type {kind}", is_foreign=True)


def _text(value: Any) -> str | None:
    text = str(value)
    return None if text in MISSING else text


def _key(key: Any, path: str) -> str:
    if isinstance(key, str):
        return key
    raise ValueNotStoredError(path, f"found the key {key!r} ({type(key).__name__})", "keys that are text")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except ValueError:
        return False
    return True


def _column_name(name: Any) -> str:
    if isinstance(name, str):
        return name
    raise ValueNotStoredError("", f"a column named {name!r} ({type(name).__name__})", "names that are text")
