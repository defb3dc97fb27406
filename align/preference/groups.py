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

from finetune.data.packing import pack


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
    def reach(self) -> int:
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

    predicts: Tensor
    sources: Tensor
    targets: Tensor
    owners: Tensor
    offsets: Tensor
    lengths: Tensor
    ends: Tensor


class GroupBatch(Predictions):
    """One forward pass over complete groups; completions are numbered across groups, in the order given.

    Attributes:
        input_ids: (B, T).
        position_ids: (B, T); those of a completion continue from its prompt, padding is 0.
        group_ids: (B, T), 1-based index of a position's group within its row; 0 is padding.
        completion_ids: (B, T), 0 for the prompt, k for the k-th completion of the group.
        sizes: (G,) K of each group.
        attention_mask: (B, T), only with one completion per row, where attention is causal as usual.
    """

    input_ids: Tensor
    position_ids: Tensor
    groups: Tensor
    parts: Tensor
    sizes: Tensor
    attention_mask: NotRequired[Tensor]


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a forward pass in multiply-adds.

    ``per_token``: of each token in linear layers. ``per_pair``: of each pair of tokens of a row in attention,
    masked or not.
    """

    token: float
    pair: float

    def __call__(self, lines: int, columns: int) -> float:
        """Return the cost of a padded batch of shape (rows, positions).

        >>> ForwardCost(per_token=10.0, per_pair=1.0)(2, 5)
        150.0
        """
        # A dense mask is added to the scores, so attention computes the masked pairs too.
        return lines * columns * (self.token + self.pair * columns)


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
    separate: bool = False
    cost: Cost | None = None

    def __call__(self, groups: Sequence[Group]) -> GroupBatch:
        lines = even_lines([len(group) for group in groups], self.budget)
        if not self.separate and not self._cheaper_apart(groups, lines):
            return _fill(groups, lines, self.pad_id)
        # Each completion gets its own copy of the prompt, so that plain causal attention is enough.
        singles = [Group(group.prompt, (one,)) for group in groups for one in group.completions]
        batch = _fill(singles, [[index] for index in range(len(singles))], self.pad_id)
        # `singles` are groups of one completion; losses need the K of the groups they come from.
        batch["sizes"] = torch.tensor([len(group.completions) for group in groups])
        # One group per row: its index is 1, and padding is 0.
        batch["attention_mask"] = batch["groups"].clamp(max=1)
        return batch

    def _cheaper_apart(self, groups: Sequence[Group], lines: Sequence[Sequence[int]]) -> bool:
        """Return whether one completion per row costs less than these rows of complete groups."""
        if self.cost is None:
            return False
        longest = max(sum(len(groups[index]) for index in line) for line in lines)
        completions = sum(len(group.completions) for group in groups)
        reach = max(group.reach for group in groups)
        return self.cost(completions, reach) < self.cost(len(lines), longest)


def even_lines(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items into as few rows of ``budget`` tokens as ``pack`` needs, with the shortest longest row.

    Returns:
        The indices of each row's items.

    >>> pack([5, 4, 3, 2, 2], 9), pack_evenly([5, 4, 3, 2, 2], 12)
    ([[0, 1], [2, 3, 4]], [[0, 2], [1, 3, 4]])
    """
    budget = max(budget, *lengths)
    lines = pack(lengths, budget)
    # Binary search for the smallest budget with as many rows: masked attention costs the square of a row's
    # length, so that of equally many rows the shortest are the cheapest.
    # No row can be shorter than the longest item, nor all of them than the mean.
    low = max(*lengths, -(-sum(lengths) // len(lines)))
    while low < budget:
        middle = (low + budget) // 2
        shorter = pack(lengths, middle)
        if len(shorter) <= len(lines):
            lines, budget = shorter, middle
        else:
            low = middle + 1
    return lines


def visible(groups: Tensor, parts: Tensor) -> Tensor:
    """Return the block mask (B, T, T), bool: [b, i, j] is true where query i attends to key j.

    A token attends to the earlier tokens of its prompt and of its own completion, and to itself.

    Args:
        group_ids_BT: (B, T), index of the group, 0 for padding.
        completion_ids_BT: (B, T), 0 for the prompt, k for the k-th completion.

    >>> block_mask(torch.tensor([[1, 1, 1, 1, 2, 0]]), torch.tensor([[0, 1, 1, 2, 0, 0]])).int()
    tensor([[[1, 0, 0, 0, 0, 0],
             [1, 1, 0, 0, 0, 0],
             [1, 1, 1, 0, 0, 0],
             [1, 0, 0, 1, 0, 0],
             [0, 0, 0, 0, 1, 0],
             [0, 0, 0, 0, 0, 1]]], dtype=torch.int32)
    """
    columns = torch.arange(groups.shape[1], device=groups.device)
    together = groups[:, :, None] == groups[:, None, :]
    inside = (parts[:, None, :] == 0) | (parts[:, :, None] == parts[:, None, :])
    # By order in the row and not by position ids, which all completions of a prompt share.
    before = columns[:, None] >= columns[None, :]
    real = groups[:, None, :] > 0
    # Padding attends to itself: a softmax over no key at all is NaN.
    return (together & inside & before & real) | (columns[:, None] == columns[None, :])


def _fill(groups: Sequence[Group], lines: Sequence[Sequence[int]], pad_id: int) -> GroupBatch:
    in_lines = [[groups[index] for index in line] for line in lines]
    input_ids = _rectangle(in_lines, _ids, padding=pad_id)
    # From 1, since 0 is padding.
    numbers = [torch.arange(1, len(line) + 1) for line in lines]
    lengths = [torch.tensor([len(group) for group in line]) for line in in_lines]
    columns = [torch.repeat_interleave(*pair) for pair in zip(numbers, lengths, strict=True)]
    return {
        "input_ids": input_ids,
        "position_ids": _rectangle(in_lines, _positions),
        "groups": pad_sequence(columns, batch_first=True),
        "parts": _rectangle(in_lines, _parts),
        "sizes": torch.tensor([len(group.completions) for group in groups]),
        # mypy looks for the optional key in what is unpacked
        **_predictions(groups, _starts(groups, lines, input_ids.shape[1]), input_ids.shape),  # type: ignore[typeddict-item]
    }


def _rectangle(
    lines: Sequence[Sequence[Group]], values: Callable[[Group], Tensor], padding: int = 0
) -> Tensor:
    rows = [torch.cat([values(group) for group in line]) for line in lines]
    return pad_sequence(rows, batch_first=True, padding_value=padding)


def _starts(groups: Sequence[Group], lines: Sequence[Sequence[int]], columns: int) -> dict[int, int]:
    """Return the flat position (row * T + position) at which each group starts."""
    starts: dict[int, int] = {}
    for number, line in enumerate(lines):
        # One value more than groups: the last one is the end of the row.
        places = accumulate((len(groups[index]) for index in line), initial=number * columns)
        starts |= dict(zip(line, places, strict=False))
    return starts


def _ids(group: Group) -> Tensor:
    return torch.cat([group.prompt, *group.completions])


def _positions(group: Group) -> Tensor:
    end = len(group.prompt)
    # Each completion restarts after the prompt, at the positions that it would have in a row of its own.
    completions = [torch.arange(end, end + len(completion)) for completion in group.completions]
    return torch.cat([torch.arange(end), *completions])


def _parts(group: Group) -> Tensor:
    lengths = torch.tensor([len(group.prompt), *map(len, group.completions)])
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _predictions(groups: Sequence[Group], starts: dict[int, int], shape: torch.Size) -> Predictions:
    completions = list(chain.from_iterable(group.completions for group in groups))
    lengths = torch.tensor([len(completion) for completion in completions])
    states = torch.cat([place for i, group in enumerate(groups) for place in _predictors(group, starts[i])])
    predicts = torch.zeros(shape.numel(), dtype=torch.bool)
    predicts[states] = True
    # Ascending state indices let `gather_logps` split logits and targets into chunks; a stable sort keeps the
    # targets of one state in the order of their completions.
    sources, order = torch.sort((predicts.cumsum(0) - 1)[states], stable=True)
    ends = torch.tensor([end for i, group in enumerate(groups) for end in _last_tokens(group, starts[i])])
    return {
        "predicts": predicts.view(shape),
        "sources": sources,
        "targets": torch.cat(completions)[order],
        "owners": torch.repeat_interleave(torch.arange(len(lengths)), lengths)[order],
        "offsets": torch.cat([torch.arange(length) for length in lengths.tolist()])[order],
        "lengths": lengths,
        "ends": torch.stack([ends // shape[1], ends % shape[1]], dim=1),
    }


def _last_tokens(group: Group, start: int) -> list[int]:
    ends = accumulate(map(len, group.completions), initial=start + len(group.prompt) - 1)
    # The first value is the last token of the prompt.
    return list(ends)[1:]


def _predictors(group: Group, start: int) -> list[Tensor]:
    """Return the flat positions that predict each completion: the prompt's last token, then its own ones."""
    prompt_end = torch.tensor([start + len(group.prompt) - 1])
    ends = _last_tokens(group, start)
    own = zip(ends, map(len, group.completions), strict=True)
    return [torch.cat([prompt_end, torch.arange(end - length + 1, end)]) for end, length in own]
