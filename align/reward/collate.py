"""Comparisons to one forward pass over whole groups, with what people said of each completion."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.preference.groups import Cost, GroupBatch, GroupCollator
from align.preference.rows.dataset import TokenizedGroup

ABSENT = -1
"""The rank of a completion that is not there."""


class RewardBatch(GroupBatch):
    """One forward pass; G groups of K completions at most.

    Attributes:
        rows: (G,) the groups' numbers.
        ranks: (G, K), 0 is the best, ties share one; ABSENT where a group has fewer than K completions.
        scores: (G, K) float32, the data's own; not a number where it has none.
        margins: (G,) float32, how much better the first completion is than the last; may be no number.
        sources: (G,) the number of each group's source.
    """

    rows: Tensor
    ranks: Tensor
    scores: Tensor
    margins: Tensor
    sources: Tensor


@dataclass(frozen=True, slots=True)
class RewardCollator:
    """Tokenised groups to tensors, in the shared layout or in the separate one."""

    pad_id: int
    separate: bool = False
    cost: Cost | None = None

    def __call__(self, groups: Sequence[TokenizedGroup]) -> RewardBatch:
        """Return one forward pass."""
        collate = GroupCollator(self.pad_id, separate=self.separate, cost=self.cost)
        ranks = [torch.from_numpy(group.ranks).long() for group in groups]
        scores = [torch.from_numpy(group.scores).float() for group in groups]
        return {
            **collate([group.as_tensors() for group in groups]),
            "rows": torch.tensor([group.row for group in groups]),
            "ranks": pad_sequence(ranks, batch_first=True, padding_value=ABSENT),
            "scores": pad_sequence(scores, batch_first=True, padding_value=torch.nan),
            "margins": torch.tensor([group.margin for group in groups]),
            "sources": torch.tensor([group.source for group in groups]),
        }
