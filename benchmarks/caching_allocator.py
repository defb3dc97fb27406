"""The algorithm of PyTorch's CUDA caching allocator, replayed on a recorded stream of allocations.

Follows c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of PyTorch 2.13 with default settings
(one stream, no expandable segments). Sizes are rounded to 512 bytes. Up to 1 MiB is served from segments
of 2 MiB, up to 10 MiB from segments of 20 MiB, more from a segment of its own, rounded to 2 MiB. The smallest
free block that fits is taken, and split if at least 512 bytes (in small segments) or more than 1 MiB remain.
Neighboring free blocks are merged.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Any

MIB = 2**20
MIN_BLOCK = 512
SMALL_SIZE, SMALL_SEGMENT = MIB, 2 * MIB
MIN_LARGE_SIZE, LARGE_SEGMENT, LARGE_ROUNDING = 10 * MIB, 20 * MIB, 2 * MIB


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment, in use or free.

    Attributes:
        address: of its first byte.
        size: bytes.
        small: whether its segment serves small sizes.
        requested: bytes that were asked for; 0 if it is free.
        previous: the block before it in its segment.
        next: the block after it.
    """

    address: int
    size: int
    small: bool
    requested: int = 0
    previous: "Block | None" = None
    next: "Block | None" = None


@dataclass
class CachingAllocator:
    """Segments reserved from the driver, and their blocks.

    Attributes:
        requested: bytes of live tensors; peak_requested: their maximum so far.
        reserved: bytes of all segments; peak_reserved: their maximum so far.
        blocks: blocks in use, by the key of their allocation.
        free_blocks: (size, address, block) by kind of segment, sorted.
    """

    requested: int = 0
    peak_requested: int = 0
    reserved: int = 0
    peak_reserved: int = 0
    blocks: dict[Any, Block] = field(default_factory=dict)
    free_blocks: dict[bool, list[tuple[int, int, Block]]] = field(
        default_factory=lambda: {True: [], False: []}
    )
    next_address: int = 0

    def allocate(self, key: Any, nbytes: int) -> None:
        """Allocate a tensor."""
        if nbytes == 0:
            return
        size = -(-nbytes // MIN_BLOCK) * MIN_BLOCK
        small = size <= SMALL_SIZE
        free = self.free_blocks[small]
        index = bisect_left(free, (size, -1))
        block = free.pop(index)[2] if index < len(free) else self._new_segment(size)
        remainder = block.size - size
        if remainder >= MIN_BLOCK if small else remainder > SMALL_SIZE:
            rest = Block(block.address + size, remainder, small, previous=block, next=block.next)
            if block.next is not None:
                block.next.previous = rest
            block.next, block.size = rest, size
            insort(free, (rest.size, rest.address, rest))
        block.requested = nbytes
        self.blocks[key] = block
        self.requested += nbytes
        self.peak_requested = max(self.peak_requested, self.requested)

    def free(self, key: Any) -> None:
        """Free a tensor; an empty one was never allocated."""
        block = self.blocks.pop(key, None)
        if block is None:
            return
        self.requested -= block.requested
        block.requested = 0
        if block.previous is not None and not block.previous.requested:
            self._merge(block.previous, block)
        if block.next is not None and not block.next.requested:
            self._merge(block, block.next, into_second=False)
        insort(self.free_blocks[block.small], (block.size, block.address, block))

    def empty_cache(self) -> None:
        """Return the segments without a live tensor to the driver."""
        for small, free in self.free_blocks.items():
            unused = [entry for entry in free if entry[2].previous is None and entry[2].next is None]
            self.reserved -= sum(size for size, _, _ in unused)
            self.free_blocks[small] = [entry for entry in free if entry not in unused]

    def _new_segment(self, size: int) -> Block:
        if size <= SMALL_SIZE:
            segment_size = SMALL_SEGMENT
        elif size < MIN_LARGE_SIZE:
            segment_size = LARGE_SEGMENT
        else:
            segment_size = -(-size // LARGE_ROUNDING) * LARGE_ROUNDING
        self.reserved += segment_size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.next_address += 2 * segment_size  # segments are not adjacent
        return Block(self.next_address - segment_size, segment_size, size <= SMALL_SIZE)

    def _merge(self, first: Block, second: Block, *, into_second: bool = True) -> None:
        """Merge two neighbors, of which one is in the list of free blocks, into the other one."""
        free_one, kept = (first, second) if into_second else (second, first)
        free = self.free_blocks[free_one.small]
        free.pop(bisect_left(free, (free_one.size, free_one.address)))
        kept.address, kept.size = first.address, first.size + second.size
        kept.previous, kept.next = first.previous, second.next
        if kept.previous is not None:
            kept.previous.next = kept
        if kept.next is not None:
            kept.next.previous = kept
