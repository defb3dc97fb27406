"""Sequence packing as bin packing (first-fit decreasing): a pure function over lengths."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins of ``capacity`` by first-fit decreasing.

    Johnson 1973: at most 11/9 of the optimum plus one bin. An item longer than the capacity gets its own bin.

    Returns:
        The indices of each bin's items, longest first; bins in the order in which they were opened.

    >>> pack([50, 200, 100, 100], 200)
    [[1], [2, 3], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins: list[list[int]] = []
    free_space: list[int] = []
    for index in order:
        bin_id = next((i for i, free in enumerate(free_space) if free >= lengths[index]), None)
        if bin_id is None:
            bins.append([index])
            free_space.append(capacity - lengths[index])
        else:
            bins[bin_id].append(index)
            free_space[bin_id] -= lengths[index]
    return bins
