"""Groups of a preference data set to one forward pass: tokens, scores, what the reference says of them."""

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
"""A ``GroupBatch`` with ``rows`` (groups,), ``scores`` (groups, K), and where it is known ``reference``,
(completions, longest): log-probabilities of the tokens under the reference, 0 behind a completion's end."""


@dataclass(frozen=True, slots=True)
class Example:
    """A group, and the reference's log-probabilities of its completions' tokens, end to end, if known."""

    group: TokenizedGroup
    reference: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class PreferenceRows:
    """What a trainer learns or measures: groups, and what the reference says of their completions.

    ``reference``: (T,) float32, all tokens of all completions end to end, not a number where no step of the
    run looks; None where it is not needed or taken live.
    """

    groups: PreferenceGroups
    reference: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.groups)

    def __getitem__(self, index: int) -> Example:
        """Return a group with its reference."""
        group = self.groups[index]
        if self.reference is None:
            return Example(group)
        start, end = self.borders[group.row : group.row + 2]
        return Example(group, self.reference[start:end])

    @property
    def lengths(self) -> list[int]:
        """Return each group's number of tokens, the prompt counted once."""
        lengths: list[int] = self.groups.lengths.tolist()
        return lengths

    @property
    def places(self) -> Sequence[str]:
        """Return where each group comes from."""
        return self.groups.places

    @cached_property
    def borders(self) -> NDArray[np.int64]:
        """Return where each group's tokens begin in ``reference``: (groups + 1,)."""
        return borders(self.groups)


def borders(groups: PreferenceGroups) -> NDArray[np.int64]:
    """Return where each group's completion tokens begin, completions counted end to end: (groups + 1,)."""
    tokens = np.cumsum(np.concatenate([[0], groups.completion_lengths]))
    firsts = np.cumsum(np.concatenate([[0], groups.completions]))
    found: NDArray[np.int64] = tokens[firsts]
    return found


def length_ratio(groups: PreferenceGroups) -> float:
    """Return the tokens of all best completions for one of all worst ones; of tied ones the mean counts."""
    owner = np.repeat(np.arange(len(groups)), groups.completions)
    last = np.full(len(groups), -1, dtype=np.int32)
    np.maximum.at(last, owner, groups.ranks)

    def mean(chosen: NDArray[np.bool_]) -> float:
        counts = np.bincount(owner[chosen], minlength=len(groups))
        return float((np.bincount(owner[chosen], groups.completion_lengths[chosen]) / counts).sum())

    return mean(groups.ranks == 0) / mean(groups.ranks == last[owner])


@dataclass(frozen=True, slots=True)
class PreferenceCollator:
    """Examples to tensors; ``separate``: each completion in a line of its own (``attention.why_separate``).

    In the shared layout lines are as long as the longest group of the pass, shorter groups fill them up:
    attention with a mask costs the square of a line's length, so that longer ones cost more and save nothing.
    With a ``cost`` each pass takes the cheaper layout.
    """

    pad_id: int
    separate: bool = False
    cost: Cost | None = None

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return one forward pass."""
        collate = GroupCollator(self.pad_id, separate=self.separate, cost=self.cost)
        batch: Batch = dict(collate([example.group.as_tensors() for example in examples]))  # type: ignore[arg-type]
        batch["rows"] = torch.tensor([example.group.row for example in examples])
        batch["scores"] = pad_sequence(
            [torch.from_numpy(scores_of(example.group)) for example in examples], batch_first=True
        )
        known = [example.reference for example in examples if example.reference is not None]
        if known:
            assert len(known) == len(examples)
            tokens = torch.split(torch.from_numpy(np.concatenate(known)), batch["lengths"].tolist())
            batch["reference"] = pad_sequence(list(tokens), batch_first=True)
        return batch


def scores_of(group: TokenizedGroup) -> NDArray[np.float32]:
    """Return how good each completion is, (K,): the data's scores where these say what the ranks say.

    Where there are none, or where the row's own order says otherwise (a kept tie), it is minus the rank.
    """
    scores, ranks = group.scores.astype(np.float32), group.ranks
    same = (scores[:, None] > scores[None, :]) == (ranks[:, None] < ranks[None, :])
    return scores if same.all() and np.isfinite(scores).all() else -ranks.astype(np.float32)
