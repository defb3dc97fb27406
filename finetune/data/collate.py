"""Collators: pad rows, or pack several per batch row with position ids; the loss is the same either way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch

IGNORE_INDEX = -100
"""The label of a token without loss (PyTorch's ``ignore_index``)."""


class LMExample(TypedDict):
    """One tokenized row: its index, ids and labels of length T (a label is the id itself, or -100).

    ``document_lengths`` (of a row with several documents): attention is masked between them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    row: int
    document_lengths: NotRequired[list[int]]


class LMBatch(TypedDict, total=False):
    """One micro-batch: tensors of shape (B, T), except ``row_ids``, the indices of the rows in it."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    row_ids: torch.Tensor


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


@dataclass(frozen=True, slots=True)
class PaddedCollator:
    """Pads rows on the right; padding is masked and carries no loss."""

    pad_id: int

    def __call__(self, examples: Sequence[LMExample]) -> LMBatch:
        """Return input_ids, labels and attention_mask of shape (B, longest row)."""
        rows = [[example] for example in examples]
        batch = _collate_rows(rows, self.pad_id)
        lengths_B = torch.tensor([len(example["input_ids"]) for example in examples])
        positions_T = torch.arange(batch["input_ids"].shape[1])
        # From the lengths and not from pad_id, which may be a token that also occurs in rows (EOS).
        batch["attention_mask"] = (positions_T[None, :] < lengths_B[:, None]).long()
        return batch


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """Packs rows without cross-contamination: position ids restart at each, without an attention mask.

    In this form transformers separates packed rows for every attention implementation: a block mask for
    eager, SDPA and FlexAttention, sequence lengths for FlashAttention, which takes a single batch row
    (``single_row``). Otherwise a batch row is as long as the longest row, so that masked attention costs no
    more than for padded rows.
    """

    pad_id: int
    single_row: bool = False

    def __call__(self, examples: Sequence[LMExample]) -> LMBatch:
        """Return input_ids, labels and position_ids of shape (B, longest batch row)."""
        lengths = [len(example["input_ids"]) for example in examples]
        # Packed per micro-batch, never across: the optimizer step has the same rows as without packing.
        bins = pack(lengths, sum(lengths) if self.single_row else max(lengths))
        rows = [[examples[index] for index in items] for items in bins]
        batch = _collate_rows(rows, self.pad_id)
        batch["position_ids"] = torch.stack(
            [_restarting_positions(row, batch["input_ids"].shape[1]) for row in rows]
        )
        return batch


Collator = PaddedCollator | PackedCollator


def _collate_rows(rows: Sequence[Sequence[LMExample]], pad_id: int) -> LMBatch:
    max_length = max(sum(len(example["input_ids"]) for example in row) for row in rows)
    input_ids_BT = torch.full((len(rows), max_length), pad_id, dtype=torch.long)
    labels_BT = torch.full((len(rows), max_length), IGNORE_INDEX, dtype=torch.long)
    for index, row in enumerate(rows):
        ids = torch.cat([example["input_ids"] for example in row])
        input_ids_BT[index, : len(ids)] = ids
        labels_BT[index, : len(ids)] = torch.cat([_shiftable_labels(example) for example in row])
    row_ids = torch.tensor([example["row"] for row in rows for example in row])
    return LMBatch(input_ids=input_ids_BT, labels=labels_BT, row_ids=row_ids)


def _shiftable_labels(example: LMExample) -> torch.Tensor:
    """Return the labels, the first one ignored: a row's first token has no prefix to be predicted from."""
    labels = example["labels"].clone()
    # In a packed row the model would predict it from the end of the row before.
    labels[0] = IGNORE_INDEX
    return labels


def _restarting_positions(row: Sequence[LMExample], max_length: int) -> torch.Tensor:
    """Return position ids: 0.. for each document of a batch row, and 0.. for the padding, as for one more."""
    example_lengths = [example.get("document_lengths", [len(example["input_ids"])]) for example in row]
    lengths = [length for document_lengths in example_lengths for length in document_lengths]
    # The padding restarts at 0 like a row, so that it is separated from the last one.
    segment_lengths = [*lengths, max_length - sum(lengths)]
    return torch.cat([torch.arange(length) for length in segment_lengths])
