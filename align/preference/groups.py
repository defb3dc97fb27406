"""Shared-prompt batches: a prompt and its K completions in one sequence, with a block mask.

K = 2 is a preference pair, K = 4 to 12 a ranked list, K = n best-of-n. The block mask lets each completion
attend to the prompt and to itself, and its position ids continue from the prompt: its hidden states are those
of a row of its own, while the prompt is encoded once. Pure functions over tensors.

Sizes: B rows, T positions, C completions of the batch, G groups, N predicted tokens, S states that predict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune.data.collate import pack


@dataclass(frozen=True, slots=True)
class Group:
    """The token ids of a prompt, shape (P,), and of its completions, each of shape (T_k,); none is empty."""

    prompt: Tensor
    completions: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        # A completion's first token is predicted by the prompt's last state, so there must be one.
        assert len(self.prompt) and self.completions and all(map(len, self.completions))

    def __len__(self) -> int:
        """Return the number of tokens of the group: P + T_1 + ... + T_K."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def max_positions(self) -> int:
        """Return the number of positions: the tokens of the prompt plus those of its longest completion."""
        return len(self.prompt) + max(map(len, self.completions))


class Predictions(TypedDict):
    """The tokens of a batch's completions and the states that predict them.

    Attributes:
        predict_mask: (B, T) bool, true at the S states that predict a token of a completion.
        state_index: (N,), ascending: which of those S states, in row-major order, predicts the n-th target. A
            prompt's last state is one state and predicts the first token of each of its K completions.
        targets: (N,) token ids: all tokens of all completions.
        completion_index: (N,) the completion of each target.
        token_offset: (N,) the position of each target in its completion.
        lengths: (C,) number of tokens of each completion.
        last_token_index: (C, 2), row and position of each completion's last token.
    """

    predict_mask: Tensor
    state_index: Tensor
    targets: Tensor
    completion_index: Tensor
    token_offset: Tensor
    lengths: Tensor
    last_token_index: Tensor


class GroupBatch(Predictions):
    """One forward pass over complete groups; completions are numbered across groups, in the order given.

    Attributes:
        input_ids: (B, T).
        position_ids: (B, T); those of a completion continue from its prompt, padding is 0.
        group_ids: (B, T), 1-based index of a position's group within its row; 0 is padding.
        segment_ids: (B, T), 0 for the prompt, k for the k-th completion of the group.
        sizes: (G,) K of each group.
        attention_mask: (B, T), only with one completion per row, where attention is causal as usual.
    """

    input_ids: Tensor
    position_ids: Tensor
    group_ids: Tensor
    segment_ids: Tensor
    sizes: Tensor
    attention_mask: NotRequired[Tensor]


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """The cost of a forward pass in multiply-adds.

    ``per_token``: of each token in linear layers. ``per_pair``: of each pair of tokens of a row in attention,
    masked or not.
    """

    per_token: float
    per_pair: float

    def __call__(self, num_rows: int, num_positions: int) -> float:
        """Return the cost of a padded batch of shape (rows, positions).

        >>> ForwardCost(per_token=10.0, per_pair=1.0)(2, 5)
        150.0
        """
        # A dense mask is added to the scores, so attention computes the masked pairs too.
        return num_rows * num_positions * (self.per_token + self.per_pair * num_positions)


@dataclass(frozen=True, slots=True)
class GroupCollator:
    """Collate groups into one forward pass.

    Shared layout: groups are concatenated into rows of about equal length, at most ``budget`` tokens or the
    longest group if that is more. ``one_per_row``: each completion after its own copy of the prompt, for
    models that cannot take a block mask (``attention.block_mask_unsupported``). The completions and their
    order are the same in both layouts. With a ``cost`` (``attention.forward_cost``) each batch takes the
    cheaper layout: many long completions of a short prompt cost more attention in one row than they save.

    >>> pair = Group(torch.tensor([5, 6, 7]), (torch.tensor([1, 2]), torch.tensor([3])))
    >>> batch = GroupCollator(pad_id=0)([pair])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 1, 2, 3]], [[0, 1, 2, 3, 4, 3]])

    The prompt's last state (7) predicts 1 and 3, the state of 1 predicts 2:

    >>> batch["predict_mask"].int().tolist(), batch["state_index"].tolist(), batch["targets"].tolist()
    ([[0, 0, 1, 1, 0, 0]], [0, 0, 1], [1, 3, 2])
    >>> batch["completion_index"].tolist(), batch["token_offset"].tolist(), batch["lengths"].tolist()
    ([0, 1, 0], [0, 0, 1], [2, 1])

    >>> batch = GroupCollator(pad_id=0, one_per_row=True)([pair])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6, 7, 1, 2], [5, 6, 7, 3, 0]], [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    >>> batch["state_index"].tolist(), batch["targets"].tolist(), batch["completion_index"].tolist()
    ([0, 1, 2], [1, 2, 3], [0, 0, 1])
    """

    pad_id: int
    budget: int = 0
    one_per_row: bool = False
    cost: ForwardCost | None = None

    def __call__(self, groups: Sequence[Group]) -> GroupBatch:
        rows = pack_evenly([len(group) for group in groups], self.budget)
        if not self.one_per_row and not self._one_per_row_is_cheaper(groups, rows):
            return _to_batch(groups, rows, self.pad_id)
        # Each completion gets its own copy of the prompt, so that plain causal attention is enough.
        singles = [Group(group.prompt, (completion,)) for group in groups for completion in group.completions]
        batch = _to_batch(singles, [[index] for index in range(len(singles))], self.pad_id)
        # `singles` are groups of one completion; losses need the K of the groups they come from.
        batch["sizes"] = torch.tensor([len(group.completions) for group in groups])
        # One group per row: its index is 1, and padding is 0.
        batch["attention_mask"] = batch["group_ids"].clamp(max=1)
        return batch

    def _one_per_row_is_cheaper(self, groups: Sequence[Group], rows: Sequence[Sequence[int]]) -> bool:
        """Return whether one completion per row costs less than these rows of complete groups."""
        if self.cost is None:
            return False
        longest_row = max(sum(len(groups[index]) for index in row) for row in rows)
        num_completions = sum(len(group.completions) for group in groups)
        max_positions = max(group.max_positions for group in groups)
        return self.cost(num_completions, max_positions) < self.cost(len(rows), longest_row)


def pack_evenly(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items into as few rows of ``budget`` tokens as ``pack`` needs, with the shortest longest row.

    Returns:
        The indices of each row's items.

    >>> pack([5, 4, 3, 2, 2], 9), pack_evenly([5, 4, 3, 2, 2], 12)
    ([[0, 1], [2, 3, 4]], [[0, 2], [1, 3, 4]])
    """
    budget = max(budget, *lengths)
    rows = pack(lengths, budget)
    # Binary search for the smallest budget with as many rows: masked attention costs the square of a row's
    # length, so that of equally many rows the shortest are the cheapest.
    # No row can be shorter than the longest item, nor all of them than the mean.
    low = max(*lengths, -(-sum(lengths) // len(rows)))
    while low < budget:
        middle = (low + budget) // 2
        candidate = pack(lengths, middle)
        if len(candidate) <= len(rows):
            rows, budget = candidate, middle
        else:
            low = middle + 1
    return rows


def block_mask(group_ids_BT: Tensor, segment_ids_BT: Tensor) -> Tensor:
    """Return the block mask (B, T, T), bool: [b, i, j] is true where query i attends to key j.

    A token attends to the earlier tokens of its prompt and of its own completion, and to itself.

    Args:
        group_ids_BT: (B, T), index of the group, 0 for padding.
        segment_ids_BT: (B, T), 0 for the prompt, k for the k-th completion.

    >>> block_mask(torch.tensor([[1, 1, 1, 1, 2, 0]]), torch.tensor([[0, 1, 1, 2, 0, 0]])).int()
    tensor([[[1, 0, 0, 0, 0, 0],
             [1, 1, 0, 0, 0, 0],
             [1, 1, 1, 0, 0, 0],
             [1, 0, 0, 1, 0, 0],
             [0, 0, 0, 0, 1, 0],
             [0, 0, 0, 0, 0, 1]]], dtype=torch.int32)
    """
    positions_T = torch.arange(group_ids_BT.shape[1], device=group_ids_BT.device)
    same_group = group_ids_BT[:, :, None] == group_ids_BT[:, None, :]
    same_completion = (segment_ids_BT[:, None, :] == 0) | (
        segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    )
    # By order in the row and not by position ids, which all completions of a prompt share.
    causal = positions_T[:, None] >= positions_T[None, :]
    not_padding = group_ids_BT[:, None, :] > 0
    # Padding attends to itself: a softmax over no key at all is NaN.
    return (same_group & same_completion & causal & not_padding) | (
        positions_T[:, None] == positions_T[None, :]
    )


def _to_batch(groups: Sequence[Group], rows: Sequence[Sequence[int]], pad_id: int) -> GroupBatch:
    groups_by_row = [[groups[index] for index in row] for row in rows]
    input_ids_BT = _pad_rows(groups_by_row, _group_token_ids, padding=pad_id)
    # From 1, since 0 is padding.
    group_numbers = [torch.arange(1, len(row) + 1) for row in rows]
    lengths = [torch.tensor([len(group) for group in row]) for row in groups_by_row]
    group_ids = [torch.repeat_interleave(*pair) for pair in zip(group_numbers, lengths, strict=True)]
    return {
        "input_ids": input_ids_BT,
        "position_ids": _pad_rows(groups_by_row, _position_ids),
        "group_ids": pad_sequence(group_ids, batch_first=True),
        "segment_ids": _pad_rows(groups_by_row, _segment_ids),
        "sizes": torch.tensor([len(group.completions) for group in groups]),
        # mypy looks for the optional key in what is unpacked
        **_predictions(groups, _group_offsets(groups, rows, input_ids_BT.shape[1]), input_ids_BT.shape),  # type: ignore[typeddict-item]
    }


def _pad_rows(
    groups_by_row: Sequence[Sequence[Group]], values: Callable[[Group], Tensor], padding: int = 0
) -> Tensor:
    rows = [torch.cat([values(group) for group in row_groups]) for row_groups in groups_by_row]
    return pad_sequence(rows, batch_first=True, padding_value=padding)


def _group_offsets(
    groups: Sequence[Group], rows: Sequence[Sequence[int]], num_positions: int
) -> dict[int, int]:
    """Return the flat position (row * T + position) at which each group starts."""
    starts: dict[int, int] = {}
    for row_index, row in enumerate(rows):
        # One value more than groups: the last one is the end of the row.
        offsets = accumulate((len(groups[index]) for index in row), initial=row_index * num_positions)
        starts |= dict(zip(row, offsets, strict=False))
    return starts


def _group_token_ids(group: Group) -> Tensor:
    return torch.cat([group.prompt, *group.completions])


def _position_ids(group: Group) -> Tensor:
    prompt_length = len(group.prompt)
    # Each completion restarts after the prompt, at the positions that it would have in a row of its own.
    completions = [
        torch.arange(prompt_length, prompt_length + len(completion)) for completion in group.completions
    ]
    return torch.cat([torch.arange(prompt_length), *completions])


def _segment_ids(group: Group) -> Tensor:
    lengths = torch.tensor([len(group.prompt), *map(len, group.completions)])
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _predictions(groups: Sequence[Group], group_offsets: dict[int, int], shape: torch.Size) -> Predictions:
    completions = list(chain.from_iterable(group.completions for group in groups))
    lengths_C = torch.tensor([len(completion) for completion in completions])
    predicting_positions_N = torch.cat(
        [
            positions
            for i, group in enumerate(groups)
            for positions in _predicting_positions(group, group_offsets[i])
        ]
    )
    predict_mask = torch.zeros(shape.numel(), dtype=torch.bool)
    predict_mask[predicting_positions_N] = True
    # Ascending state indices let `gather_logps` split logits and targets into chunks; a stable sort keeps the
    # targets of one state in the order of their completions.
    state_index_N, order = torch.sort((predict_mask.cumsum(0) - 1)[predicting_positions_N], stable=True)
    last_positions_C = torch.tensor(
        [
            last_position
            for i, group in enumerate(groups)
            for last_position in _last_token_positions(group, group_offsets[i])
        ]
    )
    return {
        "predict_mask": predict_mask.view(shape),
        "state_index": state_index_N,
        "targets": torch.cat(completions)[order],
        "completion_index": torch.repeat_interleave(torch.arange(len(lengths_C)), lengths_C)[order],
        "token_offset": torch.cat([torch.arange(length) for length in lengths_C.tolist()])[order],
        "lengths": lengths_C,
        "last_token_index": torch.stack([last_positions_C // shape[1], last_positions_C % shape[1]], dim=1),
    }


def _last_token_positions(group: Group, start: int) -> list[int]:
    ends = accumulate(map(len, group.completions), initial=start + len(group.prompt) - 1)
    # The first value is the last token of the prompt.
    return list(ends)[1:]


def _predicting_positions(group: Group, start: int) -> list[Tensor]:
    """Return the flat positions that predict each completion: the prompt's last token, then its own ones."""
    prompt_end = torch.tensor([start + len(group.prompt) - 1])
    ends = _last_token_positions(group, start)
    spans = zip(ends, map(len, group.completions), strict=True)
    return [torch.cat([prompt_end, torch.arange(end - length + 1, end)]) for end, length in spans]
