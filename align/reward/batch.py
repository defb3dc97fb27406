"""Preference groups to one batch with ranks, scores and margins, and their scores without gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from align.preference.groups import ForwardCost, GroupBatch, GroupCollator
from align.preference.rows.dataset import TokenizedGroup
from align.reward.model import completion_scores
from finetune.evaluation.calibration import FloatArray

ABSENT = -1
"""Rank of a padded completion."""


class RewardBatch(GroupBatch):
    """One forward pass over G groups of at most K completions.

    Attributes:
        row_ids: (G,) row ids of the groups.
        ranks: (G, K), 0 is the best, ties share a rank; ABSENT where a group has fewer than K completions.
        scores: (G, K) float32, the dataset's scores; NaN where there is none.
        margins: (G,) float32, margin of the first completion over the last; NaN where there is none.
        sources: (G,) index of each group's data source.
    """

    row_ids: Tensor
    ranks: Tensor
    scores: Tensor
    margins: Tensor
    sources: Tensor


@dataclass(frozen=True, slots=True)
class RewardCollator:
    """Collate tokenized groups, with a shared prompt or with one row per completion."""

    pad_id: int
    one_per_row: bool = False
    cost: ForwardCost | None = None

    def __call__(self, groups: Sequence[TokenizedGroup]) -> RewardBatch:
        collate = GroupCollator(self.pad_id, one_per_row=self.one_per_row, cost=self.cost)
        ranks = [torch.from_numpy(group.ranks.astype(np.int64)) for group in groups]
        scores = [torch.from_numpy(group.scores.astype(np.float32)) for group in groups]
        return {
            **collate([group.to_group() for group in groups]),
            "row_ids": torch.tensor([group.row for group in groups]),
            # -1 and not 0, which is the best rank.
            "ranks": pad_sequence(ranks, batch_first=True, padding_value=ABSENT),
            # NaN and not 0, which is a valid score.
            "scores": pad_sequence(scores, batch_first=True, padding_value=torch.nan),
            "margins": torch.tensor([group.margin for group in groups]),
            "sources": torch.tensor([group.source for group in groups]),
        }


@torch.no_grad()
def score_groups(
    model: nn.Module, groups: Sequence[TokenizedGroup], collator: RewardCollator, *, batch_size: int
) -> FloatArray:
    """Return the scores of all completions in group order: (C, heads).

    Args:
        model: a reward model in any wrapper; evaluated without dropout, its mode is restored.
        groups: prompts with their completions; at least one.
        collator: the collator.
        batch_size: groups per forward pass.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    lengths = [len(group.prompt_ids) + sum(map(len, group.completion_ids)) for group in groups]
    # Groups of similar length share a batch, so that little of it is padding.
    order = np.argsort(lengths, kind="stable").tolist()
    scores_by_group: dict[int, FloatArray] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collator([groups[index] for index in indices])
        on_device = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        # Double, in which metrics and normalization are computed.
        scores = completion_scores(model, on_device).double().cpu()
        chunks = torch.split(scores, batch["sizes"].tolist())
        scores_by_group |= {index: chunk.numpy() for index, chunk in zip(indices, chunks, strict=True)}
    model.train(was_training)
    return np.concatenate([scores_by_group[index] for index in range(len(groups))])
