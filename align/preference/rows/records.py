"""Types of preference data: a completion with its score, a row as read, a comparison."""

from dataclasses import dataclass
from math import isfinite, nan

from data_templates.segments import Message

Turns = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """One completion: its prompt turns, its reply (None if the dialogue ends without one), its score."""

    prompt: Turns
    reply: Message | None
    score: float = nan

    @property
    def scored(self) -> bool:
        return isfinite(self.score)


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """The completions of a row as read. ``ordered``: the row gives the order (chosen, rejected).

    ``margin``: the preference margin, if there is a column. ``notes``: deviations from the row as written,
    which the report counts.
    """

    completions: tuple[ScoredCompletion, ...]
    ordered: bool = False
    margin: float = nan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt and its completions, best first, ready for tokenization.

    ``ranks``: 0 is the best, ties share a rank (0, 1, 1, 3). ``scores``: NaN if the data has none; for labels
    1 (good) or 0 (bad). ``margin``: preference margin of the first over the last, NaN if unknown.
    ``location``: ``file:line``, ``source``: index of the source.
    """

    prompt: Turns
    replies: Turns
    scores: tuple[float, ...]
    ranks: tuple[int, ...]
    margin: float
    location: str
    source: int = 0

    @property
    def text_key(self) -> tuple[tuple[str, str, str], ...]:
        """Return the key by which duplicate rows are found: all turns, the ranks and the label."""
        turns = [(turn.role, turn.content, turn.context) for turn in (*self.prompt, *self.replies)]
        label = str(self.scores[0]) if len(self.replies) == 1 else ""
        return (*turns, ("ranks", str(self.ranks), label))
