"""Chunk a token stream into blocks, or pack documents into rows: pure functions over lengths."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from finetune.data.packing import pack

PACKING_WINDOW = 512
"""Pieces per packing window: neighbors stay near each other, and the time is linear in the data."""

Piece = tuple[int, int]
"""Start and end of a piece of a document in the flat array of all tokens."""


def block_offsets(total: int, size: int) -> list[int]:
    """Return the offsets of blocks of ``size`` tokens, and the end of the last one, which may be shorter.

    A remainder of one token is dropped: it has no prefix to be predicted from.

    >>> block_offsets(10, 4), block_offsets(9, 4)
    ([0, 4, 8, 10], [0, 4, 8])
    """
    offsets = [*range(0, total, size), total]
    return offsets[:-1] if len(offsets) > 2 and offsets[-1] - offsets[-2] == 1 else offsets


def pack_documents(lengths: Sequence[int], size: int) -> list[list[Piece]]:
    """Return the pieces of each row: documents of at most ``size`` tokens are not split, longer ones are.

    Rows are filled by first-fit decreasing over 512 pieces at a time (Ding et al. 2024, arXiv 2404.10830:
    complete documents in place of truncated ones). A remainder of one token is dropped.

    >>> pack_documents([3, 6, 2], 5)
    [[(3, 8)], [(0, 3), (9, 11)]]
    """
    spans = pairwise(accumulate(lengths, initial=0))
    pieces = [piece for start, end in spans for piece in _split_document(start, end, size)]
    rows = []
    for first in range(0, len(pieces), PACKING_WINDOW):
        window = pieces[first : first + PACKING_WINDOW]
        bins = pack([end - start for start, end in window], size)
        # Pieces in data order within a row, not in the order in which first-fit decreasing placed them.
        rows += [[window[index] for index in sorted(items)] for items in bins]
    return rows


def _split_document(start: int, end: int, size: int) -> list[Piece]:
    spans = [(offset, min(offset + size, end)) for offset in range(start, end, size)]
    return [(begin, stop) for begin, stop in spans if stop - begin > 1]
