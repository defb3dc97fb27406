"""Markers and special tokens in the data's own text, and how they are made harmless."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

ROUNDS = 4
"""Blanks put in before what is left is taken out; every marker of practice breaks in one or two rounds."""


@dataclass(frozen=True, slots=True)
class Markers:
    """A set of texts that data must not be able to write."""

    pattern: re.Pattern[str]
    pairs: frozenset[str]
    longest: int
    unbreakable: frozenset[str]

    @staticmethod
    def of(texts: Iterable[str]) -> "Markers":
        """Return the set; sets of equal texts are built once a process."""
        return _build(tuple(dict.fromkeys(text for text in texts if text)))

    def write_apart(self, text: str) -> tuple[str, int]:
        """Put a blank behind the first character of every marker; return the text and how many there were.

        What a blank cannot break (a marker of one character, or one with a blank at its border) is taken out.

        >>> Markers.of(["</s>", "### Response:"]).write_apart("ok</s>### Response: yes")
        ('ok< /s># ## Response: yes', 2)
        """
        total = 0
        for _ in range(ROUNDS):
            text, found = self.pattern.subn(self._broken, text)
            total += found
            if not found:
                return text, total
        # Blanks alone may go round in circles ("ab" and " b" among the markers); taking out comes to an end.
        while found := len(self.pattern.findall(text)):
            text = self.pattern.sub("", text)
            total += found
        return text, total

    def over_border(self, before: str, after: str) -> int:
        """Return how many characters of ``before``, at its end, belong to a marker that ends in ``after``."""
        if before[-1:] + after[:1] not in self.pairs:
            return 0
        window = before[-(self.longest - 1) :]
        return max(
            (len(window) - start for start in _over(self.pattern, window, after[: self.longest - 1])),
            default=0,
        )

    def _broken(self, match: re.Match[str]) -> str:
        marker = match[0]
        return "" if marker in self.unbreakable else f"{marker[0]} {marker[1:]}"


def _over(pattern: re.Pattern[str], before: str, after: str) -> Iterator[int]:
    """Yield where in ``before`` each marker begins that ends in ``after``; markers may overlap."""
    text = before + after
    for start in range(len(before)):
        match = pattern.match(text, start)
        if match and match.end() > len(before):
            yield start


@lru_cache(maxsize=64)
def _build(texts: tuple[str, ...]) -> Markers:
    # Longest first, so that of two markers with one beginning the longer is found. "(?!)" never matches.
    alternatives = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
    return Markers(
        pattern=re.compile(alternatives),
        pairs=frozenset(text[i : i + 2] for text in texts for i in range(len(text) - 1)),
        longest=max(map(len, texts), default=0),
        unbreakable=frozenset(text for text in texts if text in f"{text[0]} {text[1:]}"),
    )
