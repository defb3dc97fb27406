"""Collators: pad rows, or pack several per batch row with position ids; the loss is the same either way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch

from finetune.data.packing import pack

IGNORED = -100
"""The label of a token without loss (PyTorch's ``ignore_index``)."""


class Example(TypedDict):
    """One tokenized row: its index, ids and labels of length T (a label is the id itself, or -100).

    ``document_lengths`` (of a row with several documents): attention is masked between them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    row: int
    parts: NotRequired[list[int]]


class Batch(TypedDict, total=False):
    """One micro-batch: tensors of shape (B, T), except ``rows``, the indices of the rows in it."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class PaddedCollator:
    """Pads rows on the right; padding is masked and carries no loss."""

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return input_ids, labels and attention_mask of shape (B, longest row)."""
        lines = [[example] for example in examples]
        batch = _fill(lines, self.pad_id)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        columns = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (columns[None, :] < lengths[:, None]).long()
        return batch


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """Concatenates rows; position ids restart at each, and there is no attention mask.

    In this form transformers separates packed rows for every attention implementation: a block mask for
    eager, SDPA and FlexAttention, sequence lengths for FlashAttention, which takes a single batch row
    (``single_row``). Otherwise a batch row is as long as the longest row, so that masked attention costs no
    more than for padded rows.
    """

    pad_id: int
    single_line: bool = False

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return input_ids, labels and position_ids of shape (B, longest batch row)."""
        lengths = [len(example["input_ids"]) for example in examples]
        # Packed per micro-batch, never across: the optimizer step has the same rows as without packing.
        bins = pack(lengths, sum(lengths) if self.single_line else max(lengths))
        lines = [[examples[index] for index in items] for items in bins]
        batch = _fill(lines, self.pad_id)
        batch["position_ids"] = torch.stack([_positions(line, batch["input_ids"].shape[1]) for line in lines])
        return batch


Collator = PaddedCollator | PackedCollator


def _fill(lines: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    width = max(sum(len(example["input_ids"]) for example in line) for line in lines)
    input_ids = torch.full((len(lines), width), pad_id, dtype=torch.long)
    labels = torch.full((len(lines), width), IGNORED, dtype=torch.long)
    for index, line in enumerate(lines):
        ids = torch.cat([example["input_ids"] for example in line])
        input_ids[index, : len(ids)] = ids
        labels[index, : len(ids)] = torch.cat([_targets(example) for example in line])
    rows = torch.tensor([example["row"] for line in lines for example in line])
    return Batch(input_ids=input_ids, labels=labels, rows=rows)


def _targets(example: Example) -> torch.Tensor:
    """Return the labels, the first one ignored: a row's first token has no prefix to be predicted from."""
    labels = example["labels"].clone()
    # In a packed row the model would predict it from the end of the row before.
    labels[0] = IGNORED
    return labels


def _positions(line: Sequence[Example], width: int) -> torch.Tensor:
    """Return position ids: 0.. for each document of a batch row, and 0.. for the padding, as for one more."""
    rows = [example.get("parts", [len(example["input_ids"])]) for example in line]
    lengths = [length for row in rows for length in row]
    # The padding restarts at 0 like a row, so that it is separated from the last one.
    parts = [*lengths, width - sum(lengths)]
    return torch.cat([torch.arange(length) for length in parts])
