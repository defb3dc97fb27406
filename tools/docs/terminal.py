"""A picture of a terminal: ``python -m tools.docs.terminal "llm-align dpo" < run.log > picture.svg``.

The log is the output of a real run. Of its progress lines the first and the last are kept; samples are left
out.
"""

import io
import re
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

WIDTH = 128
STYLES = {"ok": "bold green", "--": "bold cyan", "!!": "bold yellow", "NO": "bold red"}
BOXES = "│├└┌┏┃┡┗┠"
PROGRESS = re.compile(r"^  step \d+/\d+ ")
LIBRARY_LOG = re.compile(r"^\[\d{4}-\d{2}-\d{2} ")
FONT_FACE = re.compile(r"\s*@font-face \{.*?\}", re.S)
"""Rich asks a server for its font; a page of ours loads nothing from elsewhere."""


def shown_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a log that the picture shows."""
    kept = [line.rstrip() for line in lines if line[:1] not in BOXES and not LIBRARY_LOG.match(line)]
    progress = [line for line in kept if PROGRESS.match(line)]
    for line in kept:
        if line not in progress or line in (progress[0], progress[-1]):
            yield line
        elif line == progress[1]:
            yield "  ..."


def terminal_svg(command: str, lines: Iterable[str]) -> str:
    """Return a terminal with a command and its output, as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", highlight=False)
    console.print(Text.assemble(("$ ", "green"), (command, "bold")))
    for line in shown_lines(lines):
        text = Text(line)
        text.truncate(WIDTH, overflow="ellipsis")
        if line[:2] in STYLES:
            text.stylize(STYLES[line[:2]], 0, 2)
        console.print(text)
    svg = console.export_svg(title="", theme=DIMMED_MONOKAI)
    return FONT_FACE.sub("", svg).replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


if __name__ == "__main__":
    print(terminal_svg(sys.argv[1], sys.stdin))
