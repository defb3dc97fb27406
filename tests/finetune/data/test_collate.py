"""Padded and packed batches, expected values by hand."""

import torch

from finetune.data.collate import IGNORE_INDEX, LMExample, PackedCollator, PaddedCollator

X = IGNORE_INDEX


def example(row, ids, labels):
    """Return a row."""
    return LMExample(input_ids=torch.tensor(ids), labels=torch.tensor(labels), row=row)


ROWS = [
    example(7, [11, 12, 13], [X, X, 13]),
    example(3, [21, 22, 23, 24, 25], [21, X, 23, 24, 25]),
    example(5, [31, 32], [31, 32]),
]


def as_lists(batch):
    """Return a batch as plain numbers."""
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_padded():
    assert as_lists(PaddedCollator(pad_id=0)(ROWS)) == {
        "input_ids": [[11, 12, 13, 0, 0], [21, 22, 23, 24, 25], [31, 32, 0, 0, 0]],
        # The first token of a row follows nothing: 21 and 31 are no targets.
        "labels": [[X, X, 13, X, X], [X, X, 23, 24, 25], [X, 32, X, X, X]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "row_ids": [7, 3, 5],
    }


def test_packed_batch_rows_are_as_long_as_the_longest_row():
    # 5 alone, 3 + 2 together: two full lines, nothing padded.
    assert as_lists(PackedCollator(pad_id=0)(ROWS)) == {
        "input_ids": [[21, 22, 23, 24, 25], [11, 12, 13, 31, 32]],
        "labels": [[X, X, 23, 24, 25], [X, X, 13, X, 32]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]],
        "row_ids": [3, 7, 5],
    }


def test_packed_into_a_single_batch_row():
    assert as_lists(PackedCollator(pad_id=0, single_row=True)(ROWS)) == {
        "input_ids": [[21, 22, 23, 24, 25, 11, 12, 13, 31, 32]],
        "labels": [[X, X, 23, 24, 25, X, X, 13, X, 32]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]],
        "row_ids": [3, 7, 5],
    }


def test_pain_13_padding_of_a_packed_row_has_its_own_positions():
    # Its positions begin at 0, so no row sees it and it sees no row.
    batch = PackedCollator(pad_id=9)([ROWS[1], ROWS[0]])
    assert batch["input_ids"].tolist() == [[21, 22, 23, 24, 25], [11, 12, 13, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist()[1] == [X, X, 13, X, X]


def test_the_same_targets_whether_padded_or_packed():
    def targets(batch):
        return sorted(label for label in batch["labels"].flatten().tolist() if label != X)

    expected = [13, 23, 24, 25, 32]
    collators = [PaddedCollator(0), PackedCollator(0), PackedCollator(0, single_row=True)]
    assert [targets(collator(ROWS)) for collator in collators] == [expected] * 3


def test_a_pad_that_is_also_a_token_of_a_row_keeps_its_label_there():
    # Pad is EOS for many bases; the EOS that ends a reply must stay a target.
    batch = PaddedCollator(pad_id=32)([ROWS[2], ROWS[0]])
    assert batch["input_ids"].tolist()[0] == [31, 32, 32]
    assert batch["labels"].tolist()[0] == [X, 32, X]
    assert batch["attention_mask"].tolist()[0] == [1, 1, 0]


def test_collating_does_not_modify_the_rows():
    before = [row["labels"].tolist() for row in ROWS]
    PaddedCollator(0)(ROWS)
    PackedCollator(0)(ROWS)
    assert [row["labels"].tolist() for row in ROWS] == before
    assert all(tensor.dtype == torch.long for tensor in PackedCollator(0)(ROWS).values())
