"""Collate preference groups: tokens, scores and reference log-probabilities of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.preference.groups import Cost, GroupCollator
from align.preference.rows.dataset import PreferenceGroups, TokenizedGroup

Batch = dict[str, Tensor]
"""A ``GroupBatch`` with ``rows`` (G,), ``scores`` (G, K) and, if precomputed, ``reference_logps`` (C, T):
token log-probabilities under the reference, 0 after a completion's end."""


@dataclass(frozen=True, slots=True)
class Example:
    """A group and, if precomputed, its reference token log-probabilities, completions concatenated."""

    group: TokenizedGroup
    reference: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class PreferenceRows:
    """The dataset of a preference trainer: groups with their reference log-probabilities.

    ``reference_logps``: (N,) float32, tokens of all completions concatenated, NaN for groups that no step of
    the run uses; None if the loss needs no reference or the reference is live.
    """

    groups: PreferenceGroups
    reference: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Example:
        group = self.groups[index]
        if self.reference is None:
            return Example(group)
        start, end = self.borders[group.row : group.row + 2]
        return Example(group, self.reference[start:end])

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each group, the prompt counted once."""
        lengths: list[int] = self.groups.lengths.tolist()
        return lengths

    @property
    def places(self) -> Sequence[str]:
        return self.groups.places

    @cached_property
    def borders(self) -> NDArray[np.int64]:
        """Return the offset of each group's tokens in ``reference_logps``: (G + 1,)."""
        return borders(self.groups)


def borders(groups: PreferenceGroups) -> NDArray[np.int64]:
    """Return the offset of each group's first completion token, completions concatenated: (G + 1,)."""
    tokens = np.cumsum(np.concatenate([[0], groups.completion_lengths]))
    firsts = np.cumsum(np.concatenate([[0], groups.completions]))
    found: NDArray[np.int64] = tokens[firsts]
    return found


def length_ratio(groups: PreferenceGroups) -> float:
    """Return the ratio of chosen to rejected tokens: best against worst completions, averaged over ties."""
    owner = np.repeat(np.arange(len(groups)), groups.completions)
    last = np.full(len(groups), -1, dtype=np.int32)
    np.maximum.at(last, owner, groups.ranks)

    def mean(chosen: NDArray[np.bool_]) -> float:
        counts = np.bincount(owner[chosen], minlength=len(groups))
        return float((np.bincount(owner[chosen], groups.completion_lengths[chosen]) / counts).sum())

    return mean(groups.ranks == 0) / mean(groups.ranks == last[owner])


@dataclass(frozen=True, slots=True)
class PreferenceCollator:
    """Collate examples; ``one_per_row``: one completion per row (``attention.block_mask_unsupported``).

    With a ``cost`` each batch takes the cheaper layout.
    """

    pad_id: int
    separate: bool = False
    cost: Cost | None = None

    def __call__(self, examples: Sequence[Example]) -> Batch:
        # Rows are as long as the longest group (no budget), and short groups fill them up. Masked attention
        # costs the square of a row's length: longer rows would cost more and save nothing.
        collate = GroupCollator(self.pad_id, separate=self.separate, cost=self.cost)
        batch: Batch = dict(collate([example.group.as_tensors() for example in examples]))  # type: ignore[arg-type]
        batch["rows"] = torch.tensor([example.group.row for example in examples])
        batch["scores"] = pad_sequence(
            [torch.from_numpy(scores_of(example.group)) for example in examples], batch_first=True
        )
        known = [example.reference for example in examples if example.reference is not None]
        if known:
            # A dataset has reference log-probabilities for all groups or for none.
            assert len(known) == len(examples)
            tokens = torch.split(torch.from_numpy(np.concatenate(known)), batch["lengths"].tolist())
            batch["reference"] = pad_sequence(list(tokens), batch_first=True)
        return batch


def scores_of(group: TokenizedGroup) -> NDArray[np.float32]:
    """Return a score per completion (K,): the data's if they agree with the ranks, else minus the rank.

    They disagree if there are none, and for a tie that was kept in the row's order (``data.on_tie``).
    """
    scores, ranks = group.scores.astype(np.float32), group.ranks
    same = (scores[:, None] > scores[None, :]) == (ranks[:, None] < ranks[None, :])
    return scores if same.all() and np.isfinite(scores).all() else -ranks.astype(np.float32)
