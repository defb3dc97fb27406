"""Near duplicates by minhash: LSH over word 5-grams, candidates verified by exact Jaccard overlap.

Broder 1997 ("On the resemblance and containment of documents"); Lee et al. 2021 (arXiv 2107.06499, section
4.2, NearDup): two texts are near duplicates if the Jaccard overlap of their word 5-grams is at least a
threshold (theirs: 0.8).
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from zlib import crc32

import numpy as np

NGRAM_SIZE = 5
"""Lee et al. 2021, section 4.2."""

NUM_HASHES = 128
MAX_MISS_RATE = 0.01
"""Maximum miss rate of hashing for pairs exactly at the threshold; above it fewer are missed."""

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")
"""A word; in Chinese and Japanese, which are written without spaces, a character."""

# A prime below 2^31, so that a * x + b of two residues fits into uint64.
PRIME = np.uint64(2**31 - 1)
# 2^64 / golden ratio, the usual odd multiplier of multiplicative hashing.
BASE = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(texts: Iterable[str], threshold: float) -> list[int | None]:
    """Return per text the index of the first retained text that it duplicates, None if it is retained.

    Args:
        texts: in order of precedence.
        threshold: minimum Jaccard overlap of word 5-grams of a duplicate, above 0; a text of fewer than 5
            words is one n-gram, and 1 means equal n-grams (ignoring case and punctuation).
    """
    rows_per_band = _rows_per_band(threshold)
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    # Sorted arrays: 8 bytes per n-gram, where a set of Python integers takes 60.
    retained: dict[int, np.ndarray] = {}
    duplicate_of: list[int | None] = []
    multipliers, offsets = _hash_family()
    for index, text in enumerate(texts):
        ngram_hashes = _ngram_hashes(text)
        signature = ((ngram_hashes[:, None] % PRIME * multipliers + offsets) % PRIME).min(axis=0)
        starts = range(0, NUM_HASHES - rows_per_band + 1, rows_per_band)
        # LSH: two texts are candidates if all hashes of at least one band are equal.
        bands = [(start, signature[start : start + rows_per_band].tobytes()) for start in starts]
        candidates = sorted({other for band in bands if band in buckets for other in buckets[band]})
        # Verified exactly, so that hashing can miss a duplicate but never drop a distinct text.
        match = next(
            (other for other in candidates if _jaccard(ngram_hashes, retained[other]) >= threshold), None
        )
        duplicate_of.append(match)
        # Dropped texts are not compared with, so a chain of near duplicates (a~b~c) loses b only.
        if match is None:
            retained[index] = ngram_hashes
            for band in bands:
                buckets[band].append(index)
    return duplicate_of


def _rows_per_band(threshold: float) -> int:
    """Return the largest band with a small miss rate (1 - s^rows)^bands at the threshold s."""
    rows = 1
    while rows < 16 and (1 - threshold ** (rows + 1)) ** (NUM_HASHES // (rows + 1)) <= MAX_MISS_RATE:
        rows += 1
    return rows


def _ngram_hashes(text: str) -> np.ndarray:
    """Return the hashes of a text's word 5-grams (uint64); a shorter text is one n-gram of all its words."""
    # crc32 and not hash(), which is salted per process for strings: every run retains the same texts.
    word_hashes = np.fromiter((crc32(word.encode()) for word in WORD.findall(text.lower())), dtype=np.uint64)
    size = max(1, min(NGRAM_SIZE, len(word_hashes)))
    # A polynomial hash of `size` words, vectorized over all positions; uint64 wraps around on purpose.
    hashes = np.zeros(max(1, len(word_hashes) - size + 1), dtype=np.uint64)
    for offset in range(min(size, len(word_hashes))):
        hashes = (hashes + word_hashes[offset : offset + len(hashes)]) * BASE
        # The low bits of a product depend on low bits alone; the shift mixes in the high ones.
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def _hash_family() -> tuple[np.ndarray, np.ndarray]:
    """Return a and b of the hash functions (a x + b) mod p."""
    # A fixed seed, not the recipe's: the same texts are retained in every run.
    rng = np.random.default_rng(0)
    multipliers = rng.integers(1, int(PRIME), NUM_HASHES, dtype=np.uint64)
    return multipliers, rng.integers(0, int(PRIME), NUM_HASHES, dtype=np.uint64)


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jaccard overlap |A and B| / |A or B| of two sorted arrays without repeats."""
    intersection = len(np.intersect1d(first, second, assume_unique=True))
    return intersection / (len(first) + len(second) - intersection)
