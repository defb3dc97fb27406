"""Reading and writing recipes as YAML 1.2, where ``2e-4`` is a number and ``no`` is a word; lines are remembered."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from finetune.recipe.errors import Problem, UserError

Lines = dict[tuple[str, ...], int]
"""The line (from 1) on which each key of a file stands, by its path."""


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """Return a file's plain content and its line numbers.

    Raises:
        UserError: the file is no YAML, names a key twice, or is no mapping.
    """
    try:
        content = YAML(typ="rt", pure=True).load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        found = " ".join(str(error.problem or error.context).split())
        raise UserError(Problem(where, found, "a YAML file", "check indentation, colons and quotes there")) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(Problem(str(path), str(error).splitlines()[0], "a UTF-8 YAML file")) from error
    if not isinstance(content, CommentedMap):
        found = "an empty file" if content is None else f"a {type(content).__name__}"
        raise UserError(Problem(str(path), found, "sections such as `model:`, `data:`, `adapter:`, `train:`"))
    return plain(content), _lines(content)


def scalar(text: str) -> Any:
    """Return the value that ``text`` has in YAML 1.2: ``3`` a number, ``[a, b]`` a list, ``no`` a word."""
    try:
        return plain(YAML(typ="rt", pure=True).load(text))
    except YAMLError:
        return text


def write(content: dict[str, Any], comments: dict[tuple[str, str], str]) -> str:
    """Return ``{section: {key: value}}`` as YAML, with a comment behind each key that has one."""
    document = CommentedMap()
    for section, values in content.items():
        document[section] = CommentedMap(values) if isinstance(values, dict) else values
    for (section, key), comment in comments.items():
        document[section].yaml_add_eol_comment(comment, key, column=48)
    buffer = io.StringIO()
    yaml = YAML()
    yaml.width = 4096
    yaml.dump(document, buffer)
    return buffer.getvalue()


def plain(node: Any) -> Any:
    """Return a node as plain dicts, lists, strings, numbers and booleans."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _lines(node: CommentedMap, above: tuple[str, ...] = ()) -> Lines:
    lines: Lines = {}
    for key, value in node.items():
        path = (*above, str(key))
        lines[path] = node.lc.key(key)[0] + 1
        if isinstance(value, CommentedMap):
            lines |= _lines(value, path)
    return lines
