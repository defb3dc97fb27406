"""Batch sampler: every row once per epoch, deterministic, no micro-batch spans two optimizer batches."""

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.batches import POOL_BATCHES, MicroBatchSampler, num_micro_batches, optimizer_batches
from finetune.distributed.rank import SINGLE_PROCESS, DistInfo

LENGTHS = st.lists(st.integers(1, 50), max_size=60)
SIZES = st.integers(1, 9)


def sampler(lengths, size, micro, *, group=True, seed=0, place=SINGLE_PROCESS):
    """Return the sampler under test."""
    return MicroBatchSampler(
        lengths, batch_size=size, micro_batch_size=micro, seed=seed, group_by_length=group, dist=place
    )


@settings(deadline=None)
@given(lengths=LENGTHS, size=SIZES, seed=st.integers(0, 99), epoch=st.integers(0, 5), group=st.booleans())
def test_each_row_once_per_epoch_and_only_the_last_batch_is_smaller(lengths, size, seed, epoch, group):
    batches = optimizer_batches(lengths, size, seed=seed, epoch=epoch, group_by_length=group)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches) == -(-len(lengths) // size)
    for batch in batches:
        assert [lengths[row] for row in batch] == sorted((lengths[row] for row in batch), reverse=True)
    assert batches == optimizer_batches(lengths, size, seed=seed, epoch=epoch, group_by_length=group)


def test_order_depends_on_epoch_and_seed():
    lengths = [1 + i % 7 for i in range(40)]
    for group in (True, False):
        orders = [
            optimizer_batches(lengths, 4, seed=seed, epoch=epoch, group_by_length=group)
            for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
        ]
        assert len({str(order) for order in orders}) == 4


def test_group_by_length_reduces_padding_without_sorting_the_epoch():
    lengths = [1 + (i * 37) % 100 for i in range(4 * POOL_BATCHES * 4)]

    def padded(group):
        batches = optimizer_batches(lengths, 4, seed=0, epoch=0, group_by_length=group)
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    assert padded(True) < 1.1 * sum(lengths) < padded(False)
    batches = optimizer_batches(lengths, 4, seed=0, epoch=0, group_by_length=True)
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


@settings(deadline=None)
@given(lengths=LENGTHS, size=SIZES, micro=SIZES, group=st.booleans())
def test_pain_12_a_micro_batch_never_spans_two_optimizer_batches(lengths, size, micro, group):
    passes = list(sampler(lengths, size, micro, group=group))
    batches = optimizer_batches(lengths, size, seed=0, epoch=0, group_by_length=group)
    for batch in batches:
        cut = [passes.pop(0) for _ in range(-(-len(batch) // micro))]
        assert [row for rows in cut for row in rows] == batch
        assert all(0 < len(rows) <= micro for rows in cut)
    assert passes == []


@settings(deadline=None)
@given(lengths=LENGTHS, size=SIZES, micro=SIZES, group=st.booleans())
def test_len_is_the_number_of_micro_batches(lengths, size, micro, group):
    batches = sampler(lengths, size, micro, group=group)
    assert len(batches) == len(list(batches))


@settings(deadline=None)
@given(lengths=LENGTHS, size=SIZES, micro=SIZES, done=st.integers(0, 20), epoch=st.integers(0, 3))
def test_pain_05_skipping_finished_batches_gives_the_same_rest(lengths, size, micro, done, epoch):
    first, again = sampler(lengths, size, micro), sampler(lengths, size, micro)
    for batches in (first, again):
        batches.set_epoch(epoch)
    list(again)  # iterating an earlier epoch must leave no state
    assert list(again)[done:] == list(first)[done:]


def test_set_epoch_changes_the_order():
    batches = sampler(list(range(1, 41)), 4, 2)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    batches.set_epoch(0)
    assert second != first
    assert list(batches) == first


@settings(deadline=None)
@given(lengths=LENGTHS, size=SIZES, micro=SIZES, count=st.integers(2, 5), epoch=st.integers(0, 3))
def test_batches_are_sharded_over_ranks_with_equal_numbers_of_micro_batches(
    lengths, size, micro, count, epoch
):
    shares = [sampler(lengths, size, micro, place=DistInfo(rank, count, rank)) for rank in range(count)]
    for share in shares:
        share.set_epoch(epoch)
    actual = [list(share) for share in shares]
    assert {len(own) for own in actual} == {len(shares[0])}
    for batch in optimizer_batches(lengths, size, seed=0, epoch=epoch, group_by_length=True):
        number = num_micro_batches(len(batch), micro, count)
        step = [own[:number] for own in actual]
        actual = [own[number:] for own in actual]
        assert sorted(row for own in step for part in own for row in part if row >= 0) == sorted(batch)
        padding_passes = [part for own in step for part in own if part[0] < 0]
        assert all(part == [~batch[-1]] for part in padding_passes)  # only to keep step: none of them counts
    assert actual == [[]] * count
