"""Chunking and packing of documents: boundaries by hand; no token lost or duplicated for any lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.documents import PACKING_WINDOW, block_offsets, pack_documents


@pytest.mark.parametrize(
    ("total", "size", "expected"),
    [
        (10, 4, [0, 4, 8, 10]),
        (8, 4, [0, 4, 8]),
        (9, 4, [0, 4, 8]),  # the ninth token has nothing before it in its block
        (3, 4, [0, 3]),
        (1, 4, [0, 1]),
    ],
)
def test_blocks_by_hand(total: int, size: int, expected: list[int]) -> None:
    assert block_offsets(total, size) == expected


@given(total=st.integers(1, 500), size=st.integers(2, 60))
def test_blocks_are_full_but_for_the_last(total: int, size: int) -> None:
    borders = block_offsets(total, size)
    widths = [end - start for start, end in zip(borders, borders[1:], strict=False)]
    assert borders[0] == 0 and total - borders[-1] in (0, 1)
    assert set(widths[:-1]) <= {size} and 1 <= widths[-1] <= size


def test_packing_by_hand() -> None:
    # Documents of 3, 6 and 2 tokens at 0, 3 and 9; the second is cut at 5 and its last token is left alone.
    assert pack_documents([3, 6, 2], 5) == [[(3, 8)], [(0, 3), (9, 11)]]


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), size=st.integers(4, 30))
def test_every_token_is_in_one_row_and_short_documents_are_not_split(lengths: list[int], size: int) -> None:
    rows = pack_documents(lengths, size)
    assert all(sum(end - start for start, end in row) <= size for row in rows)
    tokens = [token for row in rows for start, end in row for token in range(start, end)]
    alone = sum(length % size == 1 and length > size for length in lengths)
    assert len(tokens) == len(set(tokens)) == sum(lengths) - alone
    pieces = {piece for row in rows for piece in row}
    begin = 0
    for length in lengths:
        if length <= size:
            assert (begin, begin + length) in pieces
        begin += length


def test_packing_is_local() -> None:
    rows = pack_documents([10] * (2 * PACKING_WINDOW + 3), 100)
    for row in rows:
        assert row == sorted(row)
        assert row[-1][0] - row[0][0] < 10 * PACKING_WINDOW
