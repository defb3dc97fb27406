"""Which rows meet in a batch: shuffled by the seed, of similar length, the same again after a restart."""

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np
from torch.utils.data import Sampler

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

    Every optimizer batch yields ``ceil(batch_size / micro_batch_size)`` of them (the epoch's last one fewer),
    so that gradient accumulation never mixes two batches. A pure function of seed and epoch: nothing has to
    be saved to go on.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        group_by_length: bool,
    ) -> None:
        """Keep the rows' lengths and the sizes."""
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
        return full * ceil(self.batch_size / self.micro_batch_size) + ceil(rest / self.micro_batch_size)

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
            yield from (
                batch[i : i + self.micro_batch_size] for i in range(0, len(batch), self.micro_batch_size)
            )
