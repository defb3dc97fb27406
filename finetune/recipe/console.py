"""Styled output on the terminal: rich's console, with unprintable characters as escapes."""

from collections.abc import Iterable

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

from finetune.recipe.visible_text import visible


class Terminal(Console):
    """A console that shows the unprintable characters of every text as escapes; styles are added after that.

    Rich itself passes escape sequences on, and removes some control characters.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Write to standard output, or nowhere if ``quiet``."""
        # No emoji codes: ":heart:" in a text is that text.
        super().__init__(quiet=quiet, emoji=False)

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
