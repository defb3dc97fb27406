"""Fields of a row: text, JSON in a text cell, content; and the error of a field that does not fit."""

import json
from collections.abc import Mapping
from typing import Any

MAX_REPR = 60


class RowError(ValueError):
    """A field of a row that does not fit the layout; ``repair`` is a setting that helps, if there is one."""

    def __init__(self, field: str, actual: str, expected: str, repair: str = "") -> None:
        super().__init__(f"{field}: {actual}, expected {expected}")
        self.field, self.actual, self.expected, self.repair = field, actual, expected, repair


def text_field(columns: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    """Return a column's text, "" for a missing optional one; raises RowError."""
    value = columns.get(name)
    if value is None and optional:
        return ""
    return checked_text(value, name)


def checked_text(value: Any, field: str) -> str:
    """Return the value if it is valid text; raises RowError otherwise."""
    if not isinstance(value, str):
        raise RowError(field, f"found {short_repr(value)}", "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # A lone surrogate: JSON can write one (\ud83d), UTF-8 and tokenizers cannot.
        actual = f"an unpaired surrogate ({value[error.start]!r}) at position {error.start + 1}"
        raise RowError(field, actual, "valid Unicode") from error
    return value


def alias_field(columns: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the text of the first of several columns that mean the same, "" if all are blank.

    Raises:
        RowError: two of them have different texts, or one is not text.
    """
    texts = {name: text for name in names if (text := text_field(columns, name, optional=True)).strip()}
    if len(set(texts.values())) > 1:
        first, second, *_ = texts
        actual = f"found {short_repr(texts[second])}, but '{first}' is {short_repr(texts[first])}"
        raise RowError(second, actual, "one of the two, or equal texts", f"'data.ignore_columns=[{second}]'")
    return next(iter(texts.values()), "")


def has_content(value: Any) -> bool:
    """Return False for null, NaN, blank text, and lists and objects of these.

    >>> [has_content(value) for value in (None, " ", [], {"a": None}, 0, False, "a")]
    [False, False, False, False, True, True, True]
    """
    if value is None:
        return False
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(has_content, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(has_content, value))
    # NaN: how tables write a missing number.
    return not (isinstance(value, float) and value != value)


def json_cell(value: Any) -> Any:
    """Return the list or object that a text cell holds as JSON; any other value is returned as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    # Not JSON, a number of thousands of digits, or nested too deeply: it stays text.
    except (ValueError, RecursionError):
        return value


def short_repr(value: Any) -> str:
    """Return a value's repr for messages, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= MAX_REPR else text[: MAX_REPR - 3] + "..."
