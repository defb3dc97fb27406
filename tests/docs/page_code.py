"""Code on the pages: fenced blocks by language, and commands, wherever they stand."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from test_house import ROOT

from tools.docs.blocks import pages

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
INLINE = re.compile(r"`(llm-align [^`]+|make [^`]+)`")
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]+\b(?!=)|\.\.\.|<|\[|…")
"""Words such as NAME and RUN: the text describes a command, it does not give one to type."""
MISTAKE = "exit status 2"
"""A comment that says so: the command is wrong on purpose."""


def fences(language: str) -> Iterator[tuple[str, str]]:
    """Yield (page, code) of every fenced block in a language."""
    for page in pages():
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            if match["language"] == language:
                yield _name(page), dedent(match["code"])


def commands() -> list[tuple[str, str]]:
    """Return (page, command) of every command on the pages, each once: of fences, and in running text."""
    found = [(page, line) for page, code in fences("bash") for line in _lines(code)]
    for page in pages():
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        lines = (line for match in INLINE.finditer(text) for line in _lines(match[1]))
        found += [(_name(page), line) for line in lines if not (PLACEHOLDER.search(line) or _is_name(line))]
    first: dict[str, str] = {}
    for page, line in found:
        first.setdefault(line, page)
    return [(page, line) for line, page in first.items()]


def _is_name(text: str) -> bool:
    """Return whether running text speaks of a command, `llm-align merge`, or of its option."""
    return len(text.split()) < 3 or text.split()[-1].startswith("--")


def words_of(line: str) -> list[str]:
    """Return a command's words, without its comment and the file or program that takes its output."""
    words = shlex.split(line, comments=True)
    ends = [index for index, word in enumerate(words) if word in (">", ">>", "|")]
    return words[: min(ends, default=len(words))]


def _lines(code: str) -> Iterator[str]:
    """Yield the commands of a block: lines joined by a backslash are one, `&&` separates two."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            text = " ".join(command.split())
            if text and not text.startswith("#"):
                yield text


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))
