"""Hostile text on the terminal, in JSON and in HTML: shown as escapes, never executed, never an exception."""

import io
import json
import re
import sys
import unicodedata

import pytest
from jinja2 import Environment
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from finetune.recipe.console import Terminal
from finetune.recipe.terminal import echo, echo_json
from finetune.recipe.visible_text import code_point, visible, visible_json, visible_value

DANGEROUS = [
    *map(chr, (*range(9), *range(11, 32), *range(0x7F, 0xA0))),
    *"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    *"\u2028\u2029\xad\u200b\u2060\ufeff\ufff9\U000e0041",
    *"\ud800\udbff\udc00\udcff\udfff",
]
HARMLESS = "a\n\té 한국어 👩\u200d💻 می\u200cخواهم e\u0301 \\x1b [red] :heart: ﷽ 𝄞"
EXAMPLES = {
    "a color": ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    "the title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "the clipboard": ("\x1b]52;c;cm0=\x1b\\", "\\x1b]52;c;cm0=\\x1b\\"),
    "a link": ("\x1b]8;;http://a\x1b\\b\x1b]8;;\x1b\\", "\\x1b]8;;http://a\\x1b\\b\\x1b]8;;\\x1b\\"),
    "a cleared screen": ("\x1b[2J\x1b[H", r"\x1b[2J\x1b[H"),
    "an 8-bit CSI": ("\x9b31m", r"\x9b31m"),
    "a reset": ("\x1bc", r"\x1bc"),
    "a rewritten line": ("secret\rpublic\x08\x7f", r"secret\rpublic\b\x7f"),
    "a reversed name": ("\u202egpj.exe", r"\u202egpj.exe"),
    "isolates": ("\u2066a\u2069", r"\u2066a\u2069"),
    "separators": ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
    "half an emoji": ("\ud83d", r"\ud83d"),
    "a file name of bytes": ("\udcff.jsonl", r"\udcff.jsonl"),
    "hidden ASCII": ("\U000e0041", r"\U000e0041"),
    "markup and a control": ("\x1b[bold]x[/]\x1b[/]", r"\x1b[bold]x[/]\x1b[/]"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_hostile_text_is_shown_as_escapes_everywhere(name, capsys):
    text, expected = EXAMPLES[name]
    table = Table(box=None, show_header=False)
    table.add_row(escape(f"{text}|"))
    echo(text)
    echo(text, err=True)
    console = Terminal()
    console.print(text, markup=False)
    console.print(table)
    console.print(Text(text))
    echo_json([text])
    output = capsys.readouterr()
    echoed, printed, cell, styled, *lines = output.out.splitlines()
    assert [echoed, output.err, printed, cell.strip()] == [
        expected,
        f"{expected}\n",
        expected,
        f"{expected}|",
    ]
    assert json.loads("\n".join(lines)) == [text]
    # Rich itself drops these controls of a Text; the others are shown.
    assert styled == visible(re.sub("[\x07\x08\r]", "", text))
    page = (
        Environment(autoescape=True, finalize=visible_value)
        .from_string("<p>{{ text }}</p>")
        .render(text=text)
    )
    assert visible(page) == page


def test_every_control_and_no_other_character_is_escaped():
    assert [character for character in DANGEROUS if visible(character) == character] == []
    assert visible(HARMLESS) == HARMLESS
    # All that Unicode calls a control or a separator of lines; surrogates are no characters.
    kinds = {"Cc", "Cs", "Zl", "Zp"}
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) in kinds and chr(code) not in "\n\t":
            assert visible(chr(code)) != chr(code), hex(code)


def test_an_escape_is_not_escaped_again():
    assert visible(visible("\x1b\u202e")) == r"\x1b\u202e"


@pytest.mark.parametrize("encoding", ["ascii", "cp949", "latin-1", "utf-8", "utf-16"])
def test_json_is_valid_in_every_encoding(encoding):
    content = {"\x1b[31m": [" ".join(DANGEROUS), HARMLESS, "█ ⟦ 😀"]}
    text = visible_json(content, encoding)
    assert json.loads(text.encode(encoding).decode(encoding)) == content
    assert visible(text) == text


def test_json_keeps_readable_text():
    assert visible_json(["한국어 \x7f\U000e0041"]) == '[\n "한국어 \\u007f\\udb40\\udc41"\n]'
    assert visible_json(["한"], "ascii") == '[\n "\\ud55c"\n]'


def test_styles_are_added_outside_of_the_escapes(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")
    Terminal().print("[bold]a\x1b[2Jb[/] :heart:", highlight=False)
    assert stream.getvalue() == "\x1b[1ma\\x1b[2Jb\x1b[0m :heart:\n"


def test_code_points_have_a_glyph_if_they_can():
    assert [code_point(character) for character in "é\x1b\u200b 😀"] == [
        "é (U+00E9)",
        "U+001B",
        "U+200B",
        "U+0020",
        "😀 (U+1F600)",
    ]
