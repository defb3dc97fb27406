"""Which rows meet in a batch: shuffled by the seed, of similar length, the same again after a restart."""

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np
from torch.utils.data import Sampler

from finetune.planning.world import ALONE, World

POOL = 16
"""Batches whose rows are sorted by length together."""


def optimizer_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """Return the rows of each optimizer step of an epoch, longest first within a step.

    Rows are shuffled; with ``group_by_length`` each pool of 16 batches is sorted by length before it is cut,
    and the batches are shuffled again. Every row comes exactly once; the last batch may be smaller.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    sizes = np.asarray(lengths)
    if not group_by_length:
        return [_longest_first(order[i : i + batch_size], sizes) for i in range(0, len(order), batch_size)]
    pool = POOL * batch_size
    pools = [np.asarray(_longest_first(order[i : i + pool], sizes)) for i in range(0, len(order), pool)]
    batches = [part[i : i + batch_size].tolist() for part in pools for i in range(0, len(part), batch_size)]
    full = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]
    return [full[i] for i in random.permutation(len(full))] + rest


def _longest_first(rows: np.ndarray, sizes: np.ndarray) -> list[int]:
    order: list[int] = rows[np.argsort(-sizes[rows], kind="stable")].tolist()
    return order


class MicroBatches(Sampler[list[int]]):
    """Cuts each optimizer batch into forward passes of at most ``micro_batch_size`` rows of similar length.

    Of every optimizer batch each process has every size-th row, and as many forward passes as the others
    (``passes``; of the epoch's last one fewer), so that gradient accumulation never mixes two batches and no
    process waits for one that has nothing left: where its rows are used up it has a pass that does not count,
    of the row ``~number``. A pure function of seed, epoch and place: nothing has to be saved to go on, on any
    number of processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        group_by_length: bool,
        world: World = ALONE,
    ) -> None:
        """Keep the rows' lengths and the sizes; ``world`` says whose passes these are."""
        self.world = world
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.group_by_length = group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of forward passes of an epoch."""
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full * self._passes(self.batch_size) + self._passes(rest)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row numbers of each forward pass."""
        batches = optimizer_batches(
            self.lengths,
            self.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            group_by_length=self.group_by_length,
        )
        for batch in batches:
            own, size = batch[self.world.rank :: self.world.size], self.micro_batch_size
            cut = [own[start : start + size] for start in range(0, len(own), size)]
            yield from cut
            yield from [[~batch[-1]]] * (self._passes(len(batch)) - len(cut))

    def _passes(self, rows: int) -> int:
        return passes(rows, self.micro_batch_size, self.world.size)


def passes(rows: int, micro_batch_size: int, processes: int) -> int:
    """Return the forward passes that each process has of an optimizer batch.

    >>> passes(16, 4, 2)
    2
    """
    return ceil(ceil(rows / processes) / micro_batch_size)
