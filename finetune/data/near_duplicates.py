"""Texts that say almost the same as an earlier one: MinHash over word 5-grams, candidates checked exactly.

Broder 1997 ("On the resemblance and containment of documents"); Lee et al. 2021 (arXiv 2107.06499, section
4.2, NearDup): two texts are near duplicates where the Jaccard overlap of their word 5-grams is at least a
threshold (theirs: 0.8). No model is needed.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from zlib import crc32

import numpy as np

WORDS_OF_A_GRAM = 5
"""Lee et al. 2021, section 4.2."""

NUM_HASHES = 128
MOST_MISSED = 0.01
"""Share of pairs exactly at the threshold that hashing may miss; pairs above it are missed less."""

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")
"""A word; Chinese and Japanese, written without blanks, count by the character."""

PRIME = np.uint64(2**31 - 1)
BASE = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int | None]:
    """Return for each text the first kept text that it nearly repeats, or None where it is kept.

    Args:
        texts: in the order in which they are kept.
        threshold: Jaccard overlap of word 5-grams from which a text counts as a repetition, above 0; a
            text of fewer words is one gram, and 1 means the same grams (case and punctuation apart).
    """
    rows = _rows_of_a_band(threshold)
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    kept: dict[int, set[int]] = {}
    found: list[int | None] = []
    multipliers, offsets = _hash_family()
    for index, text in enumerate(texts):
        grams = _grams(text)
        least = ((grams[:, None] % PRIME * multipliers + offsets) % PRIME).min(axis=0)
        starts = range(0, NUM_HASHES - rows + 1, rows)
        bands = [(start, least[start : start + rows].tobytes()) for start in starts]
        candidates = sorted({other for band in bands if band in buckets for other in buckets[band]})
        own = set(grams.tolist())
        twin = next((other for other in candidates if _overlap(own, kept[other]) >= threshold), None)
        found.append(twin)
        if twin is None:
            kept[index] = own
            for band in bands:
                buckets[band].append(index)
    return found


def _rows_of_a_band(threshold: float) -> int:
    """Return the longest band whose chance (1 - s^rows)^bands to miss a pair at the threshold s is small."""
    rows = 1
    while rows < 16 and (1 - threshold ** (rows + 1)) ** (NUM_HASHES // (rows + 1)) <= MOST_MISSED:
        rows += 1
    return rows


def _grams(text: str) -> np.ndarray:
    """Return the hashes of a text's word 5-grams (uint64), of all its words where they are fewer."""
    words = np.fromiter((crc32(word.encode()) for word in WORD.findall(text.lower())), dtype=np.uint64)
    size = max(1, min(WORDS_OF_A_GRAM, len(words)))
    total = np.zeros(max(1, len(words) - size + 1), dtype=np.uint64)
    for place in range(min(size, len(words))):
        total = (total + words[place : place + len(total)]) * BASE
        total ^= total >> np.uint64(29)
    return np.unique(total)


def _hash_family() -> tuple[np.ndarray, np.ndarray]:
    """Return a and b of the hashes (a x + b) mod p: fixed, so that the same texts are kept every time."""
    random = np.random.default_rng(0)
    multipliers = random.integers(1, int(PRIME), NUM_HASHES, dtype=np.uint64)
    return multipliers, random.integers(0, int(PRIME), NUM_HASHES, dtype=np.uint64)


def _overlap(one: set[int], other: set[int]) -> float:
    """Return the Jaccard overlap of two sets."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
