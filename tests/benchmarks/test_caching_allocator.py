"""The replayed allocator: sizes of segments, splitting, merging and returning of blocks."""

import pytest

from benchmarks.caching_allocator import MIB, CachingAllocator


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [
        (0, 0),
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segments_are_rounded(nbytes: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate("tensor", nbytes)
    assert (allocator.requested, allocator.reserved) == (nbytes, reserved)


def test_large_blocks_are_split_if_more_than_1_mib_remains() -> None:
    allocator = CachingAllocator()
    allocator.allocate("first", 40 * MIB)
    allocator.free("first")
    allocator.allocate("most", 39 * MIB)  # 1 MiB remains, and is wasted
    allocator.allocate("small", 2 * MIB)
    assert allocator.reserved == 60 * MIB
    allocator.free("most")
    allocator.allocate("half", 20 * MIB)
    allocator.allocate("rest", 12 * MIB)  # in the 20 MiB that remain
    assert allocator.reserved == allocator.peak_reserved == 60 * MIB


def test_free_neighbors_are_merged_and_fragments_are_not() -> None:
    allocator = CachingAllocator()
    allocator.allocate("all", 60 * MIB)
    allocator.free("all")
    for name in "abc":
        allocator.allocate(name, 20 * MIB)
    allocator.free("a")
    allocator.free("c")
    allocator.allocate("large", 40 * MIB)  # 40 MiB are free, but not next to each other
    assert allocator.reserved == 100 * MIB
    allocator.free("b")
    allocator.allocate("larger", 60 * MIB)
    assert allocator.reserved == 100 * MIB


def test_empty_cache_returns_unused_segments() -> None:
    allocator = CachingAllocator()
    for name in "ab":
        allocator.allocate(name, 30 * MIB)
    allocator.allocate("small", 2 * MIB)
    allocator.free("a")
    allocator.empty_cache()
    assert allocator.reserved == 50 * MIB and allocator.peak_reserved == 80 * MIB
    allocator.free("b")
    allocator.free("small")
    allocator.empty_cache()
    assert (allocator.requested, allocator.reserved) == (0, 0)
