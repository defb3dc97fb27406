"""Styled output on the terminal: rich's console, with unprintable characters as escapes.

What a command does when nobody reads its output any more is decided here too.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import (
    Console,
    ConsoleOptions,
    HighlighterType,
    JustifyMethod,
    OverflowMethod,
    RenderableType,
)
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from finetune.recipe.disk import OUTPUT_REPAIR, storage_error
from finetune.recipe.python_messages import reader_words
from finetune.recipe.terminal import discard
from finetune.recipe.visible_text import visible

SILENCE, LONGEST_SILENCE = 4.0, 30.0
"""Seconds without a line after which a command says what it is doing: the first time, and at most later."""
POLL = 0.5


class Terminal(Console):
    """A console that shows the unprintable characters of every text as escapes; styles are added after that.

    Rich itself passes escape sequences on, and removes some control characters. If the output is lost, rich
    ends the process, in the middle of a step; this console raises an error, or calls ``on_lost``.

    Attributes:
        on_lost: called once when the output is lost; None: an error is raised.
        last_printed: when a text was printed last, by the monotonic clock.
        activities: what is going on, the innermost last.
    """

    def __init__(self, *, quiet: bool = False, file: IO[str] | None = None) -> None:
        """Write to standard output or to a file, or nowhere if ``quiet``."""
        # No emoji codes: ":heart:" in a text is that text.
        super().__init__(quiet=quiet, file=file, emoji=False)
        self.on_lost: Callable[[], None] | None = None
        self.last_printed = time.monotonic()
        self.activities: list[object] = []

    def print(self, *objects: Any, **kwargs: Any) -> None:
        """Print as rich's console does.

        Raises:
            BrokenPipeError: nobody reads the output.
            StorageError: the output is a file on a full disk.
        """
        self.last_printed = time.monotonic()
        try:
            super().print(
                *(reader_words(text) if isinstance(text, str) else text for text in objects), **kwargs
            )
        except BrokenPipeError:
            raise
        except OSError as error:
            self._lose(error)

    def on_broken_pipe(self) -> None:
        """Take the place of rich's method, which exits."""
        self._lose(BrokenPipeError())

    def _lose(self, error: OSError) -> None:
        self.quiet = True
        discard(self.file)
        if self.on_lost is not None:
            self.on_lost()
        elif isinstance(error, BrokenPipeError):
            raise error
        else:
            raise storage_error(error, "standard output", repair=OUTPUT_REPAIR) or error from error

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: HighlighterType | None = None,
    ) -> Text:
        """Convert a string to text: before the layout, which must know the widths of the escapes."""
        return super().render_str(
            visible(text),
            style=style,
            justify=justify,
            overflow=overflow,
            emoji=emoji,
            markup=markup,
            highlight=highlight,
            highlighter=highlighter,
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render to segments: the last step before styles are written, for texts that were no strings."""
        for segment in super().render(renderable, options):
            # Control segments move the cursor of a progress bar.
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


@contextmanager
def when_lost(console: Console, on_lost: Callable[[], None]) -> Iterator[None]:
    """Call ``on_lost`` if the output is lost inside the block, in place of an error."""
    # A caller of the Python API may pass a console of rich.
    if not isinstance(console, Terminal):
        yield
        return
    console.on_lost = on_lost
    try:
        yield
    finally:
        console.on_lost = None


@contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """Print what goes on inside the block, with its seconds, whenever nothing was printed for a while.

    Inside another such block this one alone prints.

    Args:
        console: a Terminal; nothing is printed on another console, or on a quiet one.
        text: what goes on; "" prints nothing.
    """
    if not isinstance(console, Terminal) or console.quiet:
        yield
        return
    done, activity = threading.Event(), object()
    console.activities.append(activity)
    thread = threading.Thread(target=_tell, args=(console, text, done, activity), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        console.activities.remove(activity)
        thread.join()


def _tell(console: Terminal, text: str, done: threading.Event, activity: object) -> None:
    started, silence = time.monotonic(), SILENCE
    while not done.wait(POLL):
        now = time.monotonic()
        if not text or console.activities[-1] is not activity or now - console.last_printed < silence:
            continue
        try:
            console.print(f"  {text}: {now - started:.0f} s", highlight=False, markup=False)
        except OSError:  # the output is lost, which the command's own next line reports
            return
        silence = min(2 * silence, LONGEST_SILENCE)


def error_terminal() -> Terminal:
    """Return a console on standard error, for commands whose output is a reply or a record."""
    return Terminal(file=sys.stderr)
