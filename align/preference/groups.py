"""A prompt and its K completions in one sequence: the prompt once, then one completion behind another.

K = 2 is a preference pair, K = 4 to 12 a ranked list, K = n the best of n. A completion sees the prompt and
itself (a block mask), and its positions go on where the prompt ends, so that each completion has the states
that it would have in a row of its own, while the prompt's are computed once. Pure functions over tensors.
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
    """The token ids of a prompt, shape (P,), and of its completions, each of shape (C_k,); none is empty."""

    prompt: Tensor
    completions: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        """Hold the caller to it: a completion's first token is predicted by the prompt's last state."""
        assert len(self.prompt) and self.completions and all(map(len, self.completions))

    def __len__(self) -> int:
        """Return the tokens of the group: P + C_1 + ... + C_K."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def reach(self) -> int:
        """Return the tokens of the prompt with its longest completion: the positions that the group takes."""
        return len(self.prompt) + max(map(len, self.completions))


class Predictions(TypedDict):
    """What a batch's completions consist of, and the states that predict it.

    Attributes:
        predicts: mask (lines, columns) of the S states that predict a token of a completion.
        sources: (N,), ascending: which of those states, in row-major order, predicts the n-th target. A
            prompt's last state predicts the first token of each of its K completions, and is there once.
        targets: (N,) token ids: all tokens of all completions.
        owners: (N,) the completion that the target is of.
        offsets: (N,) its place in that completion.
        lengths: (completions,) tokens of each completion.
        ends: (completions, 2), line and column of each completion's last token.
    """

    predicts: Tensor
    sources: Tensor
    targets: Tensor
    owners: Tensor
    offsets: Tensor
    lengths: Tensor
    ends: Tensor


class GroupBatch(Predictions):
    """One forward pass over whole groups. Completions count on from group to group, in the order given.

    Attributes:
        input_ids: (lines, columns).
        position_ids: (lines, columns); a completion's go on from its prompt's, padding has 0.
        groups: (lines, columns), the number of a column's group in its line, from 1; 0 is padding.
        parts: (lines, columns), 0 for a prompt, k for the k-th completion of its group.
        sizes: (groups,) K of each group.
        attention_mask: (lines, columns), in the separate layout alone: ordinary causal attention.
    """

    input_ids: Tensor
    position_ids: Tensor
    groups: Tensor
    parts: Tensor
    sizes: Tensor
    attention_mask: NotRequired[Tensor]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a forward pass costs, in multiply-adds.

    ``token``: of each token in linear layers. ``pair``: of each two tokens of a line in attention, masked or
    not.
    """

    token: float
    pair: float

    def __call__(self, lines: int, columns: int) -> float:
        """Return the cost of so many lines of so many columns.

        >>> Cost(token=10.0, pair=1.0)(2, 5)
        150.0
        """
        return lines * columns * (self.token + self.pair * columns)


@dataclass(frozen=True, slots=True)
class GroupCollator:
    """Groups to tensors.

    Shared layout: groups end to end in lines of about the same length, which is ``budget`` tokens at most, or
    the longest group's if that is more. Separate layout, for models whose attention takes no block mask
    (``attention.why_separate``): each completion behind its prompt in a line of its own. The same completions
    in the same order either way. With a ``cost`` (``attention.cost_of``) each pass takes the cheaper layout:
    many long completions of a short prompt cost more in one line than they save.

    >>> pair = Group(torch.tensor([5, 6, 7]), (torch.tensor([1, 2]), torch.tensor([3])))
    >>> batch = GroupCollator(pad_id=0)([pair])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 1, 2, 3]], [[0, 1, 2, 3, 4, 3]])

    The prompt's last state (7) predicts 1 and 3, the state of 1 predicts 2:

    >>> batch["predicts"].int().tolist(), batch["sources"].tolist(), batch["targets"].tolist()
    ([[0, 0, 1, 1, 0, 0]], [0, 0, 1], [1, 3, 2])
    >>> batch["owners"].tolist(), batch["offsets"].tolist(), batch["lengths"].tolist()
    ([0, 1, 0], [0, 0, 1], [2, 1])

    >>> batch = GroupCollator(pad_id=0, separate=True)([pair])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6, 7, 1, 2], [5, 6, 7, 3, 0]], [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    >>> batch["sources"].tolist(), batch["targets"].tolist(), batch["owners"].tolist()
    ([0, 1, 2], [1, 2, 3], [0, 0, 1])
    """

    pad_id: int
    budget: int = 0
    separate: bool = False
    cost: Cost | None = None

    def __call__(self, groups: Sequence[Group]) -> GroupBatch:
        """Return one forward pass."""
        lines = even_lines([len(group) for group in groups], self.budget)
        if not self.separate and not self._cheaper_apart(groups, lines):
            return _fill(groups, lines, self.pad_id)
        singles = [Group(group.prompt, (one,)) for group in groups for one in group.completions]
        batch = _fill(singles, [[index] for index in range(len(singles))], self.pad_id)
        batch["sizes"] = torch.tensor([len(group.completions) for group in groups])
        batch["attention_mask"] = batch["groups"].clamp(max=1)
        return batch

    def _cheaper_apart(self, groups: Sequence[Group], lines: Sequence[Sequence[int]]) -> bool:
        """Tell whether a line for each completion costs less than these lines of whole groups."""
        if self.cost is None:
            return False
        longest = max(sum(len(groups[index]) for index in line) for line in lines)
        completions = sum(len(group.completions) for group in groups)
        reach = max(group.reach for group in groups)
        return self.cost(completions, reach) < self.cost(len(lines), longest)


def even_lines(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put items into as few lines of ``budget`` tokens as ``pack`` finds, and make these lines alike.

    Among as many lines the shortest are the cheapest: attention with a mask costs the square of their length.

    Returns:
        The indices of each line's items.

    >>> pack([5, 4, 3, 2, 2], 9), even_lines([5, 4, 3, 2, 2], 12)
    ([[0, 1], [2, 3, 4]], [[0, 2], [1, 3, 4]])
    """
    budget = max(budget, *lengths)
    lines = pack(lengths, budget)
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
    """Return the block mask: who (second axis) sees whom (third axis).

    A token sees what stands before it in its prompt and in its own part. Padding is seen by itself alone: a
    softmax over nothing would be no number.

    Args:
        groups: (lines, columns), number of the group, 0 for padding.
        parts: (lines, columns), 0 for the prompt, k for the k-th completion.

    Returns:
        (lines, columns, columns), boolean.

    >>> visible(torch.tensor([[1, 1, 1, 1, 2, 0]]), torch.tensor([[0, 1, 1, 2, 0, 0]])).int()
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
    before = columns[:, None] >= columns[None, :]
    real = groups[:, None, :] > 0
    return (together & inside & before & real) | (columns[:, None] == columns[None, :])


def _fill(groups: Sequence[Group], lines: Sequence[Sequence[int]], pad_id: int) -> GroupBatch:
    in_lines = [[groups[index] for index in line] for line in lines]
    input_ids = _rectangle(in_lines, _ids, padding=pad_id)
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
    """Return where each group starts, counting the columns of all lines on."""
    starts: dict[int, int] = {}
    for number, line in enumerate(lines):
        places = accumulate((len(groups[index]) for index in line), initial=number * columns)
        starts |= dict(zip(line, places, strict=False))
    return starts


def _ids(group: Group) -> Tensor:
    return torch.cat([group.prompt, *group.completions])


def _positions(group: Group) -> Tensor:
    end = len(group.prompt)
    completions = [torch.arange(end, end + len(completion)) for completion in group.completions]
    return torch.cat([torch.arange(end), *completions])


def _parts(group: Group) -> Tensor:
    lengths = torch.tensor([len(group.prompt), *map(len, group.completions)])
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _predictions(groups: Sequence[Group], starts: dict[int, int], shape: torch.Size) -> Predictions:
    """Return what is predicted, and by which states."""
    completions = list(chain.from_iterable(group.completions for group in groups))
    lengths = torch.tensor([len(completion) for completion in completions])
    states = torch.cat([place for i, group in enumerate(groups) for place in _predictors(group, starts[i])])
    predicts = torch.zeros(shape.numel(), dtype=torch.bool)
    predicts[states] = True
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
    return list(ends)[1:]


def _predictors(group: Group, start: int) -> list[Tensor]:
    """Return where the states stand that predict each completion: the prompt's last one, then its own."""
    prompt_end = torch.tensor([start + len(group.prompt) - 1])
    ends = _last_tokens(group, start)
    own = zip(ends, map(len, group.completions), strict=True)
    return [torch.cat([prompt_end, torch.arange(end - length + 1, end)]) for end, length in own]
