"""Score tokenized groups in batches, without gradients."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from align.preference.rows.dataset import PreferenceGroups, TokenizedGroup
from align.reward.collate import RewardCollator
from align.reward.measures import Numbers, Scored
from align.reward.model import completion_scores


@torch.no_grad()
def score_groups(
    model: nn.Module, groups: Sequence[TokenizedGroup], collate: RewardCollator, *, size: int
) -> Numbers:
    """Return the scores of all completions in group order: (C, heads).

    Args:
        model: a reward model in any wrapper; evaluated without dropout, its mode is restored.
        groups: prompts with their completions; at least one.
        collator: the collator.
        batch_size: groups per forward pass.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    lengths = [len(group.prompt_ids) + sum(map(len, group.completion_ids)) for group in groups]
    # Groups of similar length share a batch, so that little of it is padding.
    order = np.argsort(lengths, kind="stable").tolist()
    found: dict[int, Numbers] = {}
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        batch = collate([groups[number] for number in numbers])
        on_device = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        scores = completion_scores(model, on_device).double().cpu()
        parts = torch.split(scores, batch["sizes"].tolist())
        found |= {number: part.numpy() for number, part in zip(numbers, parts, strict=True)}
    model.train(training)
    return np.concatenate([found[number] for number in range(len(groups))])


def of_own_heads(scores: Numbers, groups: PreferenceGroups, heads: Sequence[int]) -> Scored:
    """Select each comparison's scores under the head of its data source.

    Args:
        scores: (C, heads).
        groups: the scored comparisons.
        head_of_source: index of the head of each data source.
    """
    owners = np.repeat(np.asarray(heads)[list(groups.sources)], groups.completions)
    rewards = scores[np.arange(len(scores)), owners]
    return Scored(rewards, groups.ranks, groups.completion_lengths, groups.completions)
