"""Show control characters, bidirectional controls and other characters without a glyph as escapes."""

import json
import re
import unicodedata
from typing import Any

KEPT = "\n\t"
"""Control characters that are layout."""

UNPRINTABLE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls and DEL: ESC and CSI begin terminal sequences
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional marks, embeddings, overrides, isolates
    "\u2028\u2029"  # line and paragraph separators
    "\xad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb"  # invisible; not ZWJ and ZWNJ,
    "\U000e0000-\U000e007f"  # which emoji, Persian and Indic scripts need. Tags hide ASCII text.
    "\ud800-\udfff"  # unpaired surrogates: no encoding has them
    "]"
)
NAMED = {"\r": "\\r", "\x08": "\\b", "\x0c": "\\f"}


def visible(text: str) -> str:
    r"""Return a text with its unprintable characters as Python escapes; line feeds and tabs are kept.

    >>> print(visible("a\x1b[31mb\u202ec\r"))
    a\x1b[31mb\u202ec\r
    """
    # Almost every text has none, and searching is three times as fast as replacing.
    return UNPRINTABLE.sub(_python_escape, text) if UNPRINTABLE.search(text) else text


def visible_value(value: object) -> object:
    """Return a value as ``visible`` does if it is a text: Jinja's ``finalize``, before it escapes HTML."""
    # Not a subclass of str: Jinja's Markup is a page's own HTML.
    return visible(value) if type(value) is str else value


def visible_json(content: Any, encoding: str = "utf-8") -> str:
    r"""Return JSON without unprintable characters; a parser reads the same content.

    Args:
        content: what is written.
        encoding: of the output; characters that it lacks are escaped too.

    >>> print(visible_json(["\x7f\u202e"]))
    [
     "\u007f\u202e"
    ]
    """
    # They occur in JSON within strings only, where each may be written as an escape.
    text = UNPRINTABLE.sub(_json_escape, json.dumps(content, indent=1, ensure_ascii=False))
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(content, indent=1)
    return text


def code_point(character: str) -> str:
    r"""Return a character with its code point, or the code point of one without a glyph.

    >>> print(code_point("é"), code_point("\x1b"))
    é (U+00E9) U+001B
    """
    code = f"U+{ord(character):04X}"
    has_glyph = character.isprintable() and not character.isspace() and not unicodedata.combining(character)
    return f"{character} ({code})" if has_glyph else code


def _python_escape(match: re.Match[str]) -> str:
    character = match[0]
    if character in NAMED:
        return NAMED[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1] if match[0] != "\x7f" else "\\u007f"
