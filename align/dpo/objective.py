"""Preference objective: a loss from the catalog per group of K completions, its metrics, and their means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.preference.losses import metrics
from align.preference.losses.catalog import Loss, Setting
from align.preference.losses.inputs import Lists, LossOutput

MetricSums = tuple[int, dict[str, float]]
"""The number of groups, and the sum of each metric over them."""
TIE_TOLERANCE = 1e-5
"""Implicit rewards closer than this are tied: a float32 sum over a completion is not exact."""


class GroupLosses(NamedTuple):
    """Loss per group, with gradient, and margin and accuracy of its implicit rewards: (G,) each."""

    losses: Tensor
    margins: Tensor
    accuracies: Tensor


@dataclass(frozen=True, slots=True)
class PreferenceObjective:
    """A preference loss with its settings, on pairs or ranked lists, with or without a reference."""

    name: str
    loss: Callable[..., LossOutput]
    on_pairs: bool
    needs_reference: bool

    @classmethod
    def from_loss(cls, loss: Loss, settings: dict[str, Setting]) -> "PreferenceObjective":
        function = partial(loss.function(), **settings)
        return cls(loss.name, function, loss.takes == "Pairs", loss.needs.reference)

    def __call__(self, lists: Lists) -> GroupLosses:
        """Return the loss of each group.

        A loss on pairs is averaged over the group's pairs of unequal score. The margin of a loss on lists is
        that of the best over the worst completion.

        Args:
            lists: G groups of up to K completions, each with at least one pair of unequal scores.
        """
        if not self.on_pairs:
            output = self.loss(lists)
            return GroupLosses(output.losses, _margins(output), _accuracies(output))
        # All comparisons of one prompt are one batch element (InstructGPT, arXiv 2203.02155, section 3.5), so
        # that a long list weighs as much as a pair.
        output, better = self.loss(lists.pairs()), lists.better
        group_index, counts = better.nonzero()[:, 0], better.sum((-1, -2))

        # Groups have different numbers of pairs, so pairs are summed by their group's index.
        def group_mean(values: Tensor) -> Tensor:
            return values.new_zeros(len(counts)).index_add(0, group_index, values) / counts

        return GroupLosses(
            group_mean(output.losses), group_mean(_margins(output)), group_mean(_accuracies(output))
        )


def _margins(output: LossOutput) -> Tensor:
    return metrics.margins(output.chosen_rewards, output.rejected_rewards)


def _accuracies(output: LossOutput) -> Tensor:
    return metrics.accuracies(output.chosen_rewards, output.rejected_rewards, tie=TIE_TOLERANCE)


def pad_by_group(values_C: Tensor, sizes_G: Tensor) -> Tensor:
    """Pad values per completion (C,) to one row per group (G, K), with 0 for missing completions.

    >>> pad_by_group(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([2, 3]))
    tensor([[1, 2, 0],
            [3, 4, 5]])
    """
    return pad_sequence(list(torch.split(values_C, sizes_G.tolist())), batch_first=True)


@torch.no_grad()
def preference_metrics(
    lists: Lists, group_losses: GroupLosses, logps_CT: Tensor, reference_CT: Tensor | None, sizes: Tensor
) -> dict[str, Tensor]:
    """Return the logged metrics, (G,) each; chosen is the best completion of a group, rejected the worst.

    Log-probabilities and log-ratios (log pi - log ref) are per token, in nats, averaged over ties. ``kl`` is
    the k2 estimate per token, on the data's completions and not on samples of the policy.

    Args:
        lists: the groups.
        group_losses: their losses.
        logps_CT: (C, T) token log-probabilities under the policy, 0 after a completion's end.
        reference_CT: the same under the reference, None without one.
        sizes: (G,) completions of each group.
    """
    best, worst = lists.best, lists.worst
    lengths = lists.lengths.to(lists.logps)
    group_metrics = {
        "loss": group_losses.losses,
        "rewards/margins": group_losses.margins,
        "rewards/accuracies": group_losses.accuracies,
        "logps/chosen": _mean_where(lists.mean_logps, best),
        "logps/rejected": _mean_where(lists.mean_logps, worst),
        "chosen_tokens": _mean_where(lengths, best),
        "rejected_tokens": _mean_where(lengths, worst),
    }
    if reference_CT is not None and lists.reference_logps is not None:
        # Missing completions have length 0; their values are masked below.
        logratios = (lists.logps - lists.reference_logps) / lengths.clamp(min=1)
        kl_GK = pad_by_group(metrics.kl_k2(logps_CT, reference_CT).sum(1), sizes)
        group_metrics |= {
            "logratios/chosen": _mean_where(logratios, best),
            "logratios/rejected": _mean_where(logratios, worst),
            "objective/kl_per_token": kl_GK.sum(1) / lengths.sum(1),
        }
    return {name: values.detach() for name, values in group_metrics.items()}


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


class MetricAverager:
    """Averages metrics over all groups since the last ``pop_sums``."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_groups = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the metrics of some groups, each of shape (G,)."""
        for name, metric in values.items():
            # Kept on the device and summed in float64: a copy to the host per micro-batch would synchronize.
            total = metric.double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.num_groups += len(values["loss"])

    def pop_sums(self) -> MetricSums:
        """Return the number of groups and the sums, and reset them."""
        totals = self.num_groups, {name: float(value) for name, value in self.sums.items()}
        self.sums, self.num_groups = {}, 0
        return totals


def mean_preference_metrics(totals: Sequence[MetricSums]) -> dict[str, float]:
    """Return the means over the groups of all processes; token counts become ``length_ratio``.

    >>> mean_preference_metrics([(1, {"loss": 2.0, "chosen_tokens": 4.0, "rejected_tokens": 2.0}), (0, {})])
    {'loss': 2.0, 'data/length_ratio': 2.0}
    """
    num_groups = sum(count for count, _ in totals)
    # A rank without batches since the last log has no sums.
    names = next(sums for _, sums in totals if sums)
    means = {name: sum(sums.get(name, 0.0) for _, sums in totals) / num_groups for name in names}
    # The ratio of means and not the mean of ratios, which short rejected completions would dominate.
    means["data/length_ratio"] = means.pop("chosen_tokens") / means.pop("rejected_tokens")
    return means
