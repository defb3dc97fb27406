"""Chunk a token stream into blocks, or pack documents into rows: pure functions over lengths."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from finetune.data.packing import pack

WINDOW = 512
"""Pieces per packing window: neighbors stay near each other, and the time is linear in the data."""

Piece = tuple[int, int]
"""Start and end of a piece of a document in the flat array of all tokens."""


def block_starts(total: int, size: int) -> list[int]:
    """Return the offsets of blocks of ``size`` tokens, and the end of the last one, which may be shorter.

    A remainder of one token is dropped: it has no prefix to be predicted from.

    >>> block_starts(10, 4), block_starts(9, 4)
    ([0, 4, 8, 10], [0, 4, 8])
    """
    borders = [*range(0, total, size), total]
    return borders[:-1] if len(borders) > 2 and borders[-1] - borders[-2] == 1 else borders


def packed_pieces(lengths: Sequence[int], size: int) -> list[list[Piece]]:
    """Return the pieces of each row: documents of at most ``size`` tokens are not split, longer ones are.

    Rows are filled by first-fit decreasing over 512 pieces at a time (Ding et al. 2024, arXiv 2404.10830:
    complete documents in place of truncated ones). A remainder of one token is dropped.

    >>> packed_pieces([3, 6, 2], 5)
    [[(3, 8)], [(0, 3), (9, 11)]]
    """
    borders = pairwise(accumulate(lengths, initial=0))
    pieces = [piece for start, end in borders for piece in _pieces(start, end, size)]
    rows = []
    for first in range(0, len(pieces), WINDOW):
        window = pieces[first : first + WINDOW]
        bins = pack([end - start for start, end in window], size)
        # Pieces in data order within a row, not in the order in which first-fit decreasing placed them.
        rows += [[window[index] for index in sorted(items)] for items in bins]
    return rows


def _pieces(start: int, end: int, size: int) -> list[Piece]:
    cuts = [(cut, min(cut + size, end)) for cut in range(start, end, size)]
    return [(begin, stop) for begin, stop in cuts if stop - begin > 1]
