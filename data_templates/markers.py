"""Escape turn markers and special tokens in the text of the data (prompt injection)."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

MAX_ROUNDS = 4
"""Rounds of inserting spaces before the rest is deleted; markers in practice need one or two."""


@dataclass(frozen=True, slots=True)
class Markers:
    """A set of texts that must not occur in the data's text."""

    pattern: re.Pattern[str]
    adjacent_pairs: frozenset[str]
    max_length: int
    unbreakable: frozenset[str]

    @staticmethod
    def of(texts: Iterable[str]) -> "Markers":
        """Return the set for these texts, compiled once per process."""
        return _compile_markers(tuple(dict.fromkeys(text for text in texts if text)))

    def escape_markers(self, text: str) -> tuple[str, int]:
        """Insert a space after the first character of every marker; return the text and their number.

        Markers that a space cannot break (a single character, or a space at an end) are deleted.

        >>> Markers.of(["</s>", "### Response:"]).escape_markers("ok</s>### Response: yes")
        ('ok< /s># ## Response: yes', 2)
        """
        total = 0
        for _ in range(MAX_ROUNDS):
            text, num_matches = self.pattern.subn(self._break_marker, text)
            total += num_matches
            if not num_matches:
                return text, total
        # Inserting spaces may never terminate (markers "ab" and " b"); deleting does.
        while num_matches := len(self.pattern.findall(text)):
            text = self.pattern.sub("", text)
            total += num_matches
        return text, total

    def overlap_at_boundary(self, before: str, after: str) -> int:
        """Return how many characters at the end of ``before`` belong to a marker that ends in ``after``."""
        # Cheap exit for nearly all boundaries: the two characters at it must be adjacent in some marker.
        if before[-1:] + after[:1] not in self.adjacent_pairs:
            return 0
        # A marker across the boundary has at least one character on each side.
        window = before[-(self.max_length - 1) :]
        return max(
            (
                len(window) - start
                for start in _starts_across_boundary(self.pattern, window, after[: self.max_length - 1])
            ),
            default=0,
        )

    def _break_marker(self, match: re.Match[str]) -> str:
        marker = match[0]
        return "" if marker in self.unbreakable else f"{marker[0]} {marker[1:]}"


def _starts_across_boundary(pattern: re.Pattern[str], before: str, after: str) -> Iterator[int]:
    """Yield the start in ``before`` of each marker that ends in ``after``; markers may overlap."""
    text = before + after
    for start in range(len(before)):
        match = pattern.match(text, start)
        if match and match.end() > len(before):
            yield start


@lru_cache(maxsize=64)
def _compile_markers(texts: tuple[str, ...]) -> Markers:
    # Longest first, so that a marker wins over its own prefix. "(?!)" never matches.
    alternatives = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
    return Markers(
        pattern=re.compile(alternatives),
        adjacent_pairs=frozenset(text[i : i + 2] for text in texts for i in range(len(text) - 1)),
        max_length=max(map(len, texts), default=0),
        # Still contained after a space was inserted: a single character, or a space at an end.
        unbreakable=frozenset(text for text in texts if text in f"{text[0]} {text[1:]}"),
    )
