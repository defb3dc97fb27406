"""Documents to rows of one length: cut into blocks, or packed whole. Pure functions over numbers."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from finetune.data.packing import pack

WINDOW = 512
"""Pieces that are packed at a time: neighbours stay near each other, and the time grows with the length."""

Piece = tuple[int, int]
"""Where a piece of a document begins in the flat array of all tokens, and where it ends."""


def block_starts(total: int, size: int) -> list[int]:
    """Return where each block of ``size`` tokens begins, and the end of the last one, which may be shorter.

    A single token that would be left over has nothing before it to be predicted from: it is dropped.

    >>> block_starts(10, 4), block_starts(9, 4)
    ([0, 4, 8, 10], [0, 4, 8])
    """
    borders = [*range(0, total, size), total]
    return borders[:-1] if len(borders) > 2 and borders[-1] - borders[-2] == 1 else borders


def packed_pieces(lengths: Sequence[int], size: int) -> list[list[Piece]]:
    """Return the pieces of each row: documents of at most ``size`` tokens stay whole, longer ones are cut.

    Rows are filled by first-fit decreasing over 512 pieces at a time (Ding et al. 2024, arXiv 2404.10830:
    whole documents in place of cut ones). A single token left over of a document is dropped.

    >>> packed_pieces([3, 6, 2], 5)
    [[(3, 8)], [(0, 3), (9, 11)]]
    """
    borders = pairwise(accumulate(lengths, initial=0))
    pieces = [piece for start, end in borders for piece in _pieces(start, end, size)]
    rows = []
    for first in range(0, len(pieces), WINDOW):
        window = pieces[first : first + WINDOW]
        bins = pack([end - start for start, end in window], size)
        rows += [[window[index] for index in sorted(items)] for items in bins]
    return rows


def _pieces(start: int, end: int, size: int) -> list[Piece]:
    cuts = [(cut, min(cut + size, end)) for cut in range(start, end, size)]
    return [(begin, stop) for begin, stop in cuts if stop - begin > 1]
