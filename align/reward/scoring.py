"""Score tokenized groups in batches, without gradients."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from align.preference.rows.dataset import PreferenceGroups, TokenizedGroup
from align.reward.collate import RewardCollator
from align.reward.metrics import FloatArray, ScoredComparisons
from align.reward.model import completion_scores


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


def select_head_scores(
    scores: FloatArray, groups: PreferenceGroups, head_of_source: Sequence[int]
) -> ScoredComparisons:
    """Select each comparison's scores under the head of its data source.

    Args:
        scores: (C, heads).
        groups: the scored comparisons.
        head_of_source: index of the head of each data source.
    """
    head_ids = np.repeat(np.asarray(head_of_source)[list(groups.source_ids)], groups.num_completions)
    rewards = scores[np.arange(len(scores)), head_ids]
    return ScoredComparisons(rewards, groups.ranks, groups.completion_lengths, groups.num_completions)
