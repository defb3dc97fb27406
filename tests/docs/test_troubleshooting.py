"""Each message that docs/troubleshooting.md quotes occurs in the source code."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest
from test_house import ROOT, SOURCES, tree

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HEADER = "| message |"
CODE_SPAN = re.compile(r"^\| (`+)(.+?)\1 \|")
FORMAT_FIELD = re.compile(r"\{[^{}]*\}")
"""A field of a rule's message, which is a format string."""
WILDCARD = "..."


def quoted_messages() -> Iterator[str]:
    """Yield the first cell of each row of the tables of messages."""
    in_table = False
    for line in PAGE.splitlines():
        in_table = line.startswith(HEADER) or (in_table and line.startswith("|"))
        if in_table and (span := CODE_SPAN.match(line)):
            yield span[2].strip()


@cache
def source_texts() -> tuple[str, ...]:
    """Return the strings of the sources, with the wildcard in the place of each formatted value."""
    return tuple(
        text
        for file in SOURCES
        for node in ast.walk(tree(file))
        if (text := FORMAT_FIELD.sub(WILDCARD, _literal(node)))
    )


def _literal(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(part) for part in node.values)
    return WILDCARD if isinstance(node, ast.FormattedValue) else ""


def pattern(message: str) -> re.Pattern[str]:
    """Return a pattern of a quoted message: a wildcard is any text."""
    return re.compile(".*".join(map(re.escape, message.split(WILDCARD))), re.DOTALL)


MESSAGES = list(quoted_messages())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    assert any(pattern(message).search(text) for text in source_texts())


def test_the_tables_are_read_and_a_foreign_message_is_detected() -> None:
    assert len(MESSAGES) > 90 and len(set(MESSAGES)) == len(MESSAGES)
    wrong = pattern("a run with stature '...'")
    assert not any(wrong.search(text) for text in source_texts())
