"""First-fit decreasing: a partition, within capacity, never worse than its proven bound."""

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.collate import pack


def best(lengths, capacity):
    """Return the minimum number of bins, by exhaustive search (each item fits by itself)."""
    fewest = len(lengths)

    def place(index, room):
        nonlocal fewest
        if len(room) >= fewest and index < len(lengths):
            return
        if index == len(lengths):
            fewest = min(fewest, len(room))
            return
        for b, free in enumerate(room):
            if free >= lengths[index]:
                place(index + 1, [*room[:b], free - lengths[index], *room[b + 1 :]])
        place(index + 1, [*room, capacity - lengths[index]])

    place(0, [])
    return fewest


@pytest.mark.parametrize(
    ("lengths", "capacity", "bins"),
    [
        ([], 10, []),
        ([3], 10, [[0]]),
        ([50, 200, 100, 100], 200, [[1], [2, 3], [0]]),
        ([4, 6, 5, 5], 10, [[1, 0], [2, 3]]),
        ([12, 3], 10, [[0], [1]]),
        ([5, 5, 5], 5, [[0], [1], [2]]),
    ],
)
def test_examples(lengths, capacity, bins):
    assert pack(lengths, capacity) == bins


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=40), capacity=st.integers(1, 50))
def test_every_item_is_in_one_bin_within_capacity(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(index for items in bins for index in items) == list(range(len(lengths)))
    for items in bins:
        total = sum(lengths[index] for index in items)
        assert total <= capacity or len([i for i in items if lengths[i] > 0]) == 1
        assert [lengths[i] for i in items] == sorted((lengths[i] for i in items), reverse=True)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_never_worse_than_eleven_ninths_and_one(lengths):
    capacity = 20
    bins = pack(lengths, capacity)
    assert len(bins) >= ceil(sum(lengths) / capacity)
    # Dosa 2007: 11/9 of the optimum and 6/9 is the exact bound.
    assert len(bins) <= 11 / 9 * best(lengths, capacity) + 6 / 9


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=30))
def test_packing_is_deterministic(lengths):
    assert pack(lengths, 30) == pack(tuple(lengths), 30)
