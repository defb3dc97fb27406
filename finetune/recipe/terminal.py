"""Plain output on the terminal; no text can control the terminal or fail for its encoding.

Texts of data, models, file names and libraries may have control characters. They are shown as escapes.
``finetune/recipe/console.py`` does the same for styled output.
"""

import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from finetune.recipe.visible_text import visible, visible_json

PROGRAM = "llm-align"


def command_line(*words: object) -> str:
    """Return a command of llm-align that a shell reads as these words, whatever is in them."""
    return shlex.join([PROGRAM, *map(str, words)])


def typed_command(words: Sequence[str]) -> str:
    """Return the command of this process, for messages that say how it goes on: without --force."""
    return command_line(*(word for word in words if word != "--force"))


def echo(text: object, *, err: bool = False) -> None:
    """Print a text and a line feed to standard output, or to standard error."""
    print(visible(str(text)), file=sys.stderr if err else sys.stdout, flush=True)


def echo_json(content: Any) -> None:
    """Print content as JSON."""
    print(visible_json(content, (sys.stdout.encoding if sys.stdout else "") or "utf-8"), flush=True)


def prepare_terminal() -> None:
    """Let this process print any text, also in tracebacks; only for a process that is the program's own."""
    # LANG=C or PYTHONIOENCODING=ascii: a character that the terminal lacks is an escape, not an exception.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _print_exception


def discard(stream: Any) -> None:
    """Send what a standard stream has not written yet, and will write, to the null device."""
    # None: the process was started without the stream. No fileno: the stream is not a file of the system.
    if stream is None:
        return
    try:
        number = stream.fileno()
    except OSError:
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an exception that nothing has caught; its text may quote data."""
    echo("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), err=True)
