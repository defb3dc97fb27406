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

Lines = dict[tuple[str, ...], int]
"""Line number (from 1) of each key of a file, by its path."""


class _Representer(RoundTripRepresenter):
    """Writes None as ``null`` instead of an empty value."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """Return a file's plain content and its line numbers.

    Raises:
        UserError: the file is not valid YAML, has a duplicate key, or is not a mapping.
    """
    try:
        # "rt" (round trip): its nodes have line numbers.
        content = YAML(typ="rt", pure=True).load(path.read_text(encoding="utf-8-sig"))
    except MarkedYAMLError as error:
        raise UserError(_broken(path, error)) from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        found = " ".join(str(error).split())
        raise UserError(Problem(str(path), found, "a readable YAML file in UTF-8")) from error
    if not isinstance(content, CommentedMap):
        found = "the file is empty" if content is None else f"found {shown(plain(content))}, not sections"
        raise UserError(Problem(str(path), found, "sections such as `model:`, `data:`, `adapter:`, `train:`"))
    return plain(content), _lines(content)


def scalar(text: str) -> Any:
    """Parse a YAML 1.2 value: ``3`` is a number, ``[a, b]`` a list, ``no`` a string.

    Text that YAML would truncate or split (``# a``, ``a: b``) is returned unchanged, unless in brackets or
    quotes.
    """
    try:
        value = plain(YAML(typ="rt", pure=True).load(text))
    except YAMLError:
        return text
    marked = text.lstrip().startswith(("{", "[", "'", '"'))
    return text if isinstance(value, (str, dict, list)) and not marked else value


def shown(value: Any) -> str:
    """Format a value for messages, in at most 60 characters."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write(content: dict[str, Any], comments: dict[tuple[str, str], str]) -> str:
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


def plain(node: Any) -> Any:
    """Convert a ruamel node to plain dicts, lists, strings, numbers and booleans; a date to its text."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    if isinstance(node, date):
        return node.isoformat()
    if isinstance(node, ScalarBoolean):
        return bool(node)
    # ruamel's ScalarFloat and the like are subclasses; bool before int, of which it is one.
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _broken(path: Path, error: MarkedYAMLError) -> Problem:
    found, context = (" ".join(str(text or "").split()) for text in (error.problem, error.context))
    mark, start = error.problem_mark or error.context_mark, error.context_mark
    if start and "end of stream" in found:
        mark, found = start, f"unterminated ({context})"
    elif start and start is not mark:
        found = f"{found} ({context} that starts on line {start.line + 1})"
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    if isinstance(error, DuplicateKeyError):
        key = found.split('"')[1]
        return Problem(where, f"duplicate key '{key}'", "unique keys", "delete one of the two")
    return Problem(where, *_explained(found))


def _explained(found: str) -> tuple[str, str, str]:
    """Return found, expected and repair of a YAML error, in plain English where possible."""
    if "'\\t'" in found:
        return "a tab at the start of the line", "spaces: YAML does not indent with tabs", ""
    if "mapping values are not allowed" in found:
        repair = "indent the keys of a section equally; quote text that contains a colon and a space"
        return "a colon where no key is allowed", "YAML", repair
    if "cannot start any token" in found:
        character = found.split("'")[1]
        return f"a value cannot begin with '{character}'", "YAML", "put the value in quotes"
    return found, "YAML", "check indentation, colons and quotes on that line and the one above"


def _lines(node: CommentedMap, above: tuple[str, ...] = ()) -> Lines:
    lines: Lines = {}
    for key, value in node.items():
        path = (*above, str(key))
        place = (
            node.lc.data.get(key) if node.lc.data else None
        )  # a key merged in with `<<` has no line number
        lines[path] = (place[0] if place else node.lc.line) + 1
        if isinstance(value, CommentedMap):
            lines |= _lines(value, path)
    return lines
