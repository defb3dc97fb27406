"""Findings of a finished run: a diagnosis with its numbers, their meaning and a suggested action."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

PHRASE, SAID_AGAIN = 4, 3
"""A completion repeats itself if a phrase of 4 words occurs 3 times."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One diagnosis: the numbers, their meaning, and an action if one is needed."""

    name: str
    said: str
    means: str
    action: str = ""

    def line(self) -> str:
        """Return the finding as one line for the terminal; ``!!`` marks one that needs action."""
        mark = "!!" if self.action else "--"
        return (
            f"{mark}  {self.name:<14}{self.said}: {self.means}{f' -> {self.action}' if self.action else ''}"
        )

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "warned": bool(self.action)}


def repetition(replies: Sequence[tuple[str, str]], action: str) -> Finding | None:
    """Return a finding if more completions repeat themselves or each other after training than before.

    Args:
        completions: completions of some prompts, before and after training.
        action: the suggested action.
    """
    shares = [[_repeats(pair[when]) for pair in replies] for when in (0, 1)]
    again = [sum(share) for share in shares]
    same = [_copies([pair[when] for pair in replies]) for when in (0, 1)]
    if again[1] <= again[0] and same[1] <= same[0]:
        return None
    said = (
        f"of {len(replies)} completions, self-repeating: {again[0]} → {again[1]}, "
        f"duplicates of another one: {same[0]} → {same[1]}"
    )
    means = "repetition loops, typical of a policy that drifted too far from its reference"
    return Finding("repetition", said, means, action)


def _repeats(reply: str) -> bool:
    words = reply.split()
    phrases = Counter(zip(*(islice(words, start, None) for start in range(PHRASE)), strict=False))
    return max(phrases.values(), default=0) >= SAID_AGAIN


def _copies(replies: Sequence[str]) -> int:
    """Return how many completions are exact duplicates of an earlier one."""
    return len(replies) - len(set(replies))
