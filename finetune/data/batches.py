"""Batch sampler: seeded shuffling, length grouping, sharding over ranks; the same batches after a resume."""

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np
from torch.utils.data import Sampler

from finetune.distributed.rank import SINGLE_PROCESS, DistInfo

POOL_BATCHES = 16
"""Batches per pool: rows are sorted by length within a pool."""


def optimizer_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """Return the row indices of each optimizer step of an epoch, longest first within a step.

    Rows are shuffled; with ``group_by_length`` each pool of 16 batches is sorted by length before it is
    split, and the batches are shuffled again. Every row is used exactly once; the last batch may be smaller.
    """
    # Seeded by epoch and not by a running generator: any epoch's order is known without the earlier ones.
    rng = np.random.default_rng([seed, epoch])
    row_ids = rng.permutation(len(lengths))
    sizes = np.asarray(lengths)
    # Sorted within a batch, so that its micro-batches have rows of similar length.
    if not group_by_length:
        return [
            _longest_first(row_ids[i : i + batch_size], sizes) for i in range(0, len(row_ids), batch_size)
        ]
    pool = POOL_BATCHES * batch_size
    pools = [np.asarray(_longest_first(row_ids[i : i + pool], sizes)) for i in range(0, len(row_ids), pool)]
    batches = [
        pool_rows[i : i + batch_size].tolist()
        for pool_rows in pools
        for i in range(0, len(pool_rows), batch_size)
    ]
    full = [batch for batch in batches if len(batch) == batch_size]
    # The smaller batch stays last: only the last step of an epoch may have fewer micro-batches.
    rest = [batch for batch in batches if len(batch) < batch_size]
    # Shuffled again: in order, each pool would be trained on from its longest rows to its shortest.
    return [full[i] for i in rng.permutation(len(full))] + rest


def _longest_first(row_ids: np.ndarray, sizes: np.ndarray) -> list[int]:
    # Stable, so that rows of equal length stay shuffled and every rank computes the same order.
    ordered: list[int] = row_ids[np.argsort(-sizes[row_ids], kind="stable")].tolist()
    return ordered


class MicroBatchSampler(Sampler[list[int]]):
    """Splits each optimizer batch into micro-batches of at most ``micro_batch_size`` rows of similar length.

    Each rank gets every world_size-th row of an optimizer batch, and as many micro-batches as the other ranks
    (fewer for the last batch of an epoch), so that gradient accumulation never mixes two batches. A rank
    whose rows are exhausted gets padding micro-batches: one row ``~index`` that does not count toward the
    loss. A pure function of seed, epoch and rank: resuming needs no saved state, on any number of processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        group_by_length: bool,
        dist: DistInfo = SINGLE_PROCESS,
    ) -> None:
        """Store lengths and sizes; ``dist`` has this process's rank and the number of processes."""
        self.dist = dist
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.group_by_length = group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the rows."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of micro-batches of an epoch, equal on all ranks."""
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full * self._num_micro_batches(self.batch_size) + self._num_micro_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row indices of each micro-batch."""
        batches = optimizer_batches(
            self.lengths,
            self.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            group_by_length=self.group_by_length,
        )
        for batch in batches:
            # Every world_size-th row of a batch sorted by length: the ranks' rows have similar lengths.
            local_rows, size = batch[self.dist.rank :: self.dist.world_size], self.micro_batch_size
            micro_batches = [local_rows[start : start + size] for start in range(0, len(local_rows), size)]
            yield from micro_batches
            # Every rank must run the same number of forward passes, or collectives would deadlock. Padding is
            # the shortest row of the batch, the cheapest; its negative index (~) marks it.
            yield from [[~batch[-1]]] * (self._num_micro_batches(len(batch)) - len(micro_batches))

    def _num_micro_batches(self, num_rows: int) -> int:
        return num_micro_batches(num_rows, self.micro_batch_size, self.dist.world_size)


def num_micro_batches(num_rows: int, micro_batch_size: int, world_size: int) -> int:
    """Return the number of micro-batches per rank of an optimizer batch of ``num_rows`` rows.

    >>> num_micro_batches(16, 4, 2)
    2
    """
    # Rank 0 has the most rows of a batch that does not divide evenly; its count applies to all ranks.
    return ceil(ceil(num_rows / world_size) / micro_batch_size)
