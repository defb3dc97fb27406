"""A row of preference data as its layout says it, before anything is left out."""

from dataclasses import dataclass
from math import isfinite, nan

from data_templates._segments import Message

Turns = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion: the turns before it, the reply (None: the dialogue ends without one), its score."""

    prompt: Turns
    reply: Message | None
    score: float = nan

    @property
    def scored(self) -> bool:
        """Tell whether the row gives this completion a score."""
        return isfinite(self.score)


@dataclass(frozen=True, slots=True)
class Judged:
    """A row's completions. ``ordered``: the row itself says that the first is the better one.

    ``margin`` is how much better, where a column says so. ``notes`` tell what was read otherwise than it
    stands there; the report counts them.
    """

    answers: tuple[Answer, ...]
    ordered: bool = False
    margin: float = nan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt and its completions, the best first: what is tokenised.

    ``ranks``: 0 is the best, equal ones share a rank (0, 1, 1, 3). ``scores``: the data's own, not a number
    where it has none; for a label 1 (good) or 0 (bad). ``margin``: how much better the first is than the
    last, not a number where the data does not say. ``where`` is ``file:line``, ``source`` its number.
    """

    prompt: Turns
    replies: Turns
    scores: tuple[float, ...]
    ranks: tuple[int, ...]
    margin: float
    where: str
    source: int = 0

    @property
    def words(self) -> tuple[tuple[str, str, str], ...]:
        """Return what is said, by whom, and which completion is the better one."""
        said = [(turn.role, turn.content, turn.context) for turn in (*self.prompt, *self.replies)]
        label = str(self.scores[0]) if len(self.replies) == 1 else ""
        return (*said, ("ranks", str(self.ranks), label))
