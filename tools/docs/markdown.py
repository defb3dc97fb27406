"""Markdown tables and cells."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

BRACES = re.compile(r"(?P<code>`[^`]*`)|(?P<mapping>\{[^{}]*\})")
"""Inline code, or a mapping in braces outside of it."""


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a cell's line breaks and bars are escaped."""
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """Return text as inline code, empty for empty text."""
    return f"`{text}`" if text else ""


def value(content: Any) -> str:
    """Return a setting's value as inline code, in YAML's flow style."""
    return code(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))


def _cell(text: str) -> str:
    # As code: the site takes `{name: value}` at the end of a cell for HTML attributes, and drops it.
    text = BRACES.sub(lambda found: _code_span(found["code"]) or code(found["mapping"]), text)
    return " ".join(text.split()).replace("|", "\\|")


def _code_span(span: str | None) -> str:
    """Return inline code for a cell, as HTML if it has bars: the site would show their backslashes."""
    if span is None or "|" not in span:
        return span or ""
    return f"<code>{html.escape(span.strip('`'), quote=False).replace('|', '&#124;')}</code>"
