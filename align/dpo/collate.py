"""Collate preference groups: tokens, scores and reference log-probabilities of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.preference.groups import ForwardCost, GroupCollator
from align.preference.rows.dataset import PreferenceGroups, TokenizedGroup

PreferenceBatch = dict[str, Tensor]
"""A ``GroupBatch`` with ``row_ids`` (G,), ``scores`` (G, K) and, if precomputed, ``reference_logps`` (C, T):
token log-probabilities under the reference, 0 after a completion's end."""


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A group and, if precomputed, its reference token log-probabilities, completions concatenated."""

    group: TokenizedGroup
    reference_logps: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class PreferenceDataset:
    """The dataset of a preference trainer: groups with their reference log-probabilities.

    ``reference_logps``: (N,) float32, tokens of all completions concatenated, NaN for groups that no step of
    the run uses; None if the loss needs no reference or the reference is live.
    """

    groups: PreferenceGroups
    reference_logps: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> PreferenceExample:
        group = self.groups[index]
        if self.reference_logps is None:
            return PreferenceExample(group)
        start, end = self.offsets[group.row : group.row + 2]
        return PreferenceExample(group, self.reference_logps[start:end])

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each group, the prompt counted once."""
        lengths: list[int] = self.groups.lengths.tolist()
        return lengths

    @property
    def locations(self) -> Sequence[str]:
        return self.groups.locations

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Return the offset of each group's tokens in ``reference_logps``: (G + 1,)."""
        return completion_offsets(self.groups)


def completion_offsets(groups: PreferenceGroups) -> NDArray[np.int64]:
    """Return the offset of each group's first completion token, completions concatenated: (G + 1,)."""
    token_offsets = np.cumsum(np.concatenate([[0], groups.completion_lengths]))
    first_completions = np.cumsum(np.concatenate([[0], groups.num_completions]))
    offsets: NDArray[np.int64] = token_offsets[first_completions]
    return offsets


def data_length_ratio(groups: PreferenceGroups) -> float:
    """Return the ratio of chosen to rejected tokens: best against worst completions, averaged over ties."""
    group_of_completion = np.repeat(np.arange(len(groups)), groups.num_completions)
    worst_rank = np.full(len(groups), -1, dtype=np.int32)
    # `at` handles repeated indices, which a fancy assignment would overwrite.
    np.maximum.at(worst_rank, group_of_completion, groups.ranks)

    def mean_length(selected: NDArray[np.bool_]) -> float:
        counts = np.bincount(group_of_completion[selected], minlength=len(groups))
        return float(
            (np.bincount(group_of_completion[selected], groups.completion_lengths[selected]) / counts).sum()
        )

    # Sums over the groups, whose number cancels in the ratio.
    return mean_length(groups.ranks == 0) / mean_length(groups.ranks == worst_rank[group_of_completion])


@dataclass(frozen=True, slots=True)
class PreferenceCollator:
    """Collate examples; ``one_per_row``: one completion per row (``attention.block_mask_unsupported``).

    With a ``cost`` each batch takes the cheaper layout.
    """

    pad_id: int
    one_per_row: bool = False
    cost: ForwardCost | None = None

    def __call__(self, examples: Sequence[PreferenceExample]) -> PreferenceBatch:
        # Rows are as long as the longest group (no budget), and short groups fill them up. Masked attention
        # costs the square of a row's length: longer rows would cost more and save nothing.
        collate = GroupCollator(self.pad_id, one_per_row=self.one_per_row, cost=self.cost)
        batch: PreferenceBatch = dict(collate([example.group.to_group() for example in examples]))  # type: ignore[arg-type]
        batch["row_ids"] = torch.tensor([example.group.row for example in examples])
        batch["scores"] = pad_sequence(
            [torch.from_numpy(preference_scores(example.group)) for example in examples], batch_first=True
        )
        reference_logps = [
            example.reference_logps for example in examples if example.reference_logps is not None
        ]
        if reference_logps:
            # A dataset has reference log-probabilities for all groups or for none.
            assert len(reference_logps) == len(examples)
            logps_by_completion = torch.split(
                torch.from_numpy(np.concatenate(reference_logps)), batch["lengths"].tolist()
            )
            batch["reference_logps"] = pad_sequence(list(logps_by_completion), batch_first=True)
        return batch


def preference_scores(group: TokenizedGroup) -> NDArray[np.float32]:
    """Return a score per completion (K,): the data's if they agree with the ranks, else minus the rank.

    They disagree if there are none, and for a tie that was kept in the row's order (``data.on_tie``).
    """
    scores, ranks = group.scores.astype(np.float32), group.ranks
    agree = (scores[:, None] > scores[None, :]) == (ranks[:, None] < ranks[None, :])
    return scores if agree.all() and np.isfinite(scores).all() else -ranks.astype(np.float32)
