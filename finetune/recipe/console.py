"""Styled output on the terminal: rich's console, with unprintable characters as escapes.

What a command does when nobody reads its output any more is decided here too.
"""

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


class Terminal(Console):
    """A console that shows the unprintable characters of every text as escapes; styles are added after that.

    Rich itself passes escape sequences on, and removes some control characters. If the output is lost, rich
    ends the process, in the middle of a step; this console raises an error, or calls ``on_lost``.

    Attributes:
        on_lost: called once when the output is lost; None: an error is raised.
    """

    def __init__(self, *, quiet: bool = False, file: IO[str] | None = None) -> None:
        """Write to standard output or to a file, or nowhere if ``quiet``."""
        # No emoji codes: ":heart:" in a text is that text.
        super().__init__(quiet=quiet, file=file, emoji=False)
        self.on_lost: Callable[[], None] | None = None

    def print(self, *objects: Any, **kwargs: Any) -> None:
        """Print as rich's console does.

        Raises:
            BrokenPipeError: nobody reads the output.
            StorageError: the output is a file on a full disk.
        """
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
