"""A loss of the catalogue on whole groups: one number a group, however many completions it has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.preference.losses import metrics
from align.preference.losses.catalogue import Loss, Setting
from align.preference.losses.inputs import Lists, LossOutput

Totals = tuple[int, dict[str, float]]
"""How many groups were watched, and the sum of each measure over them."""
TIE = 1e-5
"""Implicit rewards nearer to each other than this are equal: a float32 sum over a completion is not exact."""


class GroupLosses(NamedTuple):
    """Each group's loss, with gradient, and margin and accuracy of its implicit rewards: (groups,)."""

    losses: Tensor
    margins: Tensor
    accuracies: Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: a loss with its settings, on pairs or on lists, with or without a reference."""

    name: str
    loss: Callable[..., LossOutput]
    on_pairs: bool
    needs_reference: bool

    @classmethod
    def of(cls, loss: Loss, settings: dict[str, Setting]) -> "Objective":
        """Return a loss of the catalogue with its settings."""
        function = partial(loss.function(), **settings)
        return cls(loss.name, function, loss.takes == "Pairs", loss.needs.reference)

    def __call__(self, lists: Lists) -> GroupLosses:
        """Return each group's loss.

        A loss on pairs is the mean over the group's pairs of unequal score: the comparisons of one prompt are
        one element of the batch (InstructGPT, arXiv 2203.02155, section 3.5), and a long list weighs as much
        as a pair. A loss on lists is the list's; its margin is that of the best over the worst completion.

        Args:
            lists: G groups of up to K completions, each with one pair of unequal score at least.
        """
        if not self.on_pairs:
            output = self.loss(lists)
            return GroupLosses(output.losses, _margins(output), _accuracies(output))
        output, better = self.loss(lists.pairs()), lists.better
        owners, counts = better.nonzero()[:, 0], better.sum((-1, -2))

        def mean(values: Tensor) -> Tensor:
            return values.new_zeros(len(counts)).index_add(0, owners, values) / counts

        return GroupLosses(mean(output.losses), mean(_margins(output)), mean(_accuracies(output)))


def _margins(output: LossOutput) -> Tensor:
    return metrics.margins(output.chosen_rewards, output.rejected_rewards)


def _accuracies(output: LossOutput) -> Tensor:
    return metrics.accuracies(output.chosen_rewards, output.rejected_rewards, tie=TIE)


def by_group(values: Tensor, sizes: Tensor) -> Tensor:
    """Return a value a completion, (completions,), as a row a group, (groups, K), 0 where there is none.

    >>> by_group(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([2, 3]))
    tensor([[1, 2, 0],
            [3, 4, 5]])
    """
    return pad_sequence(list(torch.split(values, sizes.tolist())), batch_first=True)


@torch.no_grad()
def measures(
    lists: Lists, found: GroupLosses, logps: Tensor, reference: Tensor | None, sizes: Tensor
) -> dict[str, Tensor]:
    """Return what is watched, a value a group; chosen is the best completion, rejected the worst one.

    Log-probabilities and drifts (log pi - log ref) are per token, in nats; of tied ones the mean. ``kl`` is
    k2, per token: a distance from the reference on the data's completions, not on the policy's own.

    Args:
        lists: the groups.
        found: their losses.
        logps: (completions, longest) of each token under the policy, 0 behind the end.
        reference: the same under the reference, None without one.
        sizes: (groups,) completions of each.
    """
    best, worst = lists.best, lists.worst
    lengths = lists.lengths.to(lists.logps)
    watched = {
        "loss": found.losses,
        "margin": found.margins,
        "accuracy": found.accuracies,
        "chosen_logps": _mean(lists.means, best),
        "rejected_logps": _mean(lists.means, worst),
        "chosen_tokens": _mean(lengths, best),
        "rejected_tokens": _mean(lengths, worst),
    }
    if reference is not None and lists.reference_logps is not None:
        drifts = (lists.logps - lists.reference_logps) / lengths.clamp(min=1)
        distances = by_group(metrics.kl_k2(logps, reference).sum(1), sizes)
        watched |= {
            "chosen_drift": _mean(drifts, best),
            "rejected_drift": _mean(drifts, worst),
            "kl": distances.sum(1) / lengths.sum(1),
        }
    return {name: values.detach() for name, values in watched.items()}


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return values.masked_fill(~chosen, 0.0).sum(-1) / chosen.sum(-1)


class Means:
    """Means over all groups since they were last taken."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.groups = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add values of some groups, each of shape (groups,)."""
        for name, own in values.items():
            total = own.double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.groups += len(values["loss"])

    def take(self) -> Totals:
        """Return the number of groups and the sums, and begin anew."""
        found = self.groups, {name: float(value) for name, value in self.sums.items()}
        self.sums, self.groups = {}, 0
        return found


def means_of(parts: Sequence[Totals]) -> dict[str, float]:
    """Return the means over the groups of all processes; the lengths become ``length_ratio``.

    >>> means_of([(1, {"loss": 2.0, "chosen_tokens": 4.0, "rejected_tokens": 2.0}), (0, {})])
    {'loss': 2.0, 'length_ratio': 2.0}
    """
    groups = sum(count for count, _ in parts)
    names = next(sums for _, sums in parts if sums)
    means = {name: sum(sums.get(name, 0.0) for _, sums in parts) / groups for name in names}
    means["length_ratio"] = means.pop("chosen_tokens") / means.pop("rejected_tokens")
    return means
