"""What a run says of itself at its end: a number, what it means, and what can be done about it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

PHRASE, SAID_AGAIN = 4, 3
"""A reply repeats itself where so many words in a row come so often."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that happened: numbers, what they mean, and what can be done where something should be."""

    name: str
    said: str
    means: str
    action: str = ""

    def line(self) -> str:
        """Return it as a line for the terminal."""
        mark = "!!" if self.action else "--"
        return (
            f"{mark}  {self.name:<14}{self.said}: {self.means}{f' -> {self.action}' if self.action else ''}"
        )

    def record(self) -> dict[str, Any]:
        """Return it as run.json keeps it."""
        return {**asdict(self), "warned": bool(self.action)}


def repetition(replies: Sequence[tuple[str, str]], action: str) -> Finding | None:
    """Return what is said where more replies repeat themselves or each other than before.

    Args:
        replies: to some prompts, before and after.
        action: what to do about it.
    """
    shares = [[_repeats(pair[when]) for pair in replies] for when in (0, 1)]
    again = [sum(share) for share in shares]
    same = [_copies([pair[when] for pair in replies]) for when in (0, 1)]
    if again[1] <= again[0] and same[1] <= same[0]:
        return None
    said = (
        f"of {len(replies)} replies {again[0]} → {again[1]} repeat themselves, "
        f"{same[0]} → {same[1]} another one"
    )
    means = "the policy falls into loops, as one that has moved too far does"
    return Finding("repetition", said, means, action)


def _repeats(reply: str) -> bool:
    """Tell whether a phrase comes again and again in a reply."""
    words = reply.split()
    phrases = Counter(zip(*(islice(words, start, None) for start in range(PHRASE)), strict=False))
    return max(phrases.values(), default=0) >= SAID_AGAIN


def _copies(replies: Sequence[str]) -> int:
    """Return how many replies are those of an earlier prompt, word for word."""
    return len(replies) - len(set(replies))
