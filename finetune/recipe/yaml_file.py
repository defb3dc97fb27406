"""Read and write recipes as YAML 1.2 (``2e-4`` is a number, ``no`` a string), with line numbers of keys."""

import io
from datetime import date
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarbool import ScalarBoolean

from finetune.recipe.errors import Problem, UserError

LineNumbers = dict[tuple[str, ...], int]
"""Line number (from 1) of each key of a file, by its path."""


class _Representer(RoundTripRepresenter):
    """Writes None as ``null`` instead of an empty value."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def read_yaml(path: Path) -> tuple[dict[str, Any], LineNumbers]:
    """Return a file's plain content and its line numbers.

    Raises:
        UserError: the file is not valid YAML, has a duplicate key, or is not a mapping.
    """
    try:
        # "rt" (round trip): its nodes have line numbers. utf-8-sig: a byte order mark is no error.
        content = YAML(typ="rt", pure=True).load(path.read_text(encoding="utf-8-sig"))
    except MarkedYAMLError as error:
        raise UserError(_syntax_problem(path, error)) from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        actual = " ".join(str(error).split())
        raise UserError(Problem(str(path), actual, "a readable YAML file in UTF-8")) from error
    if not isinstance(content, CommentedMap):
        actual = (
            "the file is empty"
            if content is None
            else f"found {format_value(to_plain(content))}, not sections"
        )
        raise UserError(
            Problem(str(path), actual, "sections such as `model:`, `data:`, `adapter:`, `train:`")
        )
    return to_plain(content), _line_numbers(content)


def parse_scalar(text: str) -> Any:
    """Parse a YAML 1.2 value: ``3`` is a number, ``[a, b]`` a list, ``no`` a string.

    Text that YAML would truncate or split (``# a``, ``a: b``) is returned unchanged, unless in brackets or
    quotes.
    """
    try:
        value = to_plain(YAML(typ="rt", pure=True).load(text))
    except YAMLError:
        return text
    is_delimited = text.lstrip().startswith(("{", "[", "'", '"'))
    return text if isinstance(value, (str, dict, list)) and not is_delimited else value


def format_value(value: Any) -> str:
    """Format a value for messages, in at most 60 characters."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dump_yaml(content: dict[str, Any], comments: dict[tuple[str, str], str]) -> str:
    """Return ``{section: {key: value}}`` as YAML, with end-of-line comments on keys."""
    document = CommentedMap()
    for section, values in content.items():
        document[section] = CommentedMap(values) if isinstance(values, dict) else values
    for (section, key), comment in comments.items():
        document[section].yaml_add_eol_comment(comment, key, column=48)
    buffer = io.StringIO()
    yaml = YAML()
    yaml.width = 4096  # no line breaks inside values
    yaml.Representer = _Representer
    yaml.dump(document, buffer)
    return buffer.getvalue()


def to_plain(node: Any) -> Any:
    """Convert a ruamel node to plain dicts, lists, strings, numbers and booleans; a date to its text."""
    if isinstance(node, dict):
        return {str(key): to_plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [to_plain(value) for value in node]
    if isinstance(node, date):
        return node.isoformat()
    if isinstance(node, ScalarBoolean):
        return bool(node)
    # ruamel's ScalarFloat and the like are subclasses; bool before int, of which it is one.
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _syntax_problem(path: Path, error: MarkedYAMLError) -> Problem:
    actual, context = (" ".join(str(text or "").split()) for text in (error.problem, error.context))
    mark, start = error.problem_mark or error.context_mark, error.context_mark
    if start and "end of stream" in actual:
        mark, actual = start, f"unterminated ({context})"
    elif start and start is not mark:
        actual = f"{actual} ({context} that starts on line {start.line + 1})"
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    if isinstance(error, DuplicateKeyError):
        key = actual.split('"')[1]
        return Problem(where, f"duplicate key '{key}'", "unique keys", "delete one of the two")
    return Problem(where, *_explain_syntax_error(actual))


def _explain_syntax_error(actual: str) -> tuple[str, str, str]:
    """Return found, expected and repair of a YAML error, in plain English where possible."""
    if "'\\t'" in actual:
        return "a tab at the start of the line", "spaces: YAML does not indent with tabs", ""
    if "mapping values are not allowed" in actual:
        repair = "indent the keys of a section equally; quote text that contains a colon and a space"
        return "a colon where no key is allowed", "YAML", repair
    if "cannot start any token" in actual:
        character = actual.split("'")[1]
        return f"a value cannot begin with '{character}'", "YAML", "put the value in quotes"
    return actual, "YAML", "check indentation, colons and quotes on that line and the one above"


def _line_numbers(node: CommentedMap, prefix: tuple[str, ...] = ()) -> LineNumbers:
    lines: LineNumbers = {}
    for key, value in node.items():
        path = (*prefix, str(key))
        position = (
            node.lc.data.get(key) if node.lc.data else None
        )  # a key merged in with `<<` has no line number
        lines[path] = (position[0] if position else node.lc.line) + 1
        if isinstance(value, CommentedMap):
            lines |= _line_numbers(value, path)
    return lines
