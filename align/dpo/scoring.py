"""Forward pass of DPO: policy and reference log-probabilities, group losses and metrics."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from align.dpo.objective import GroupLosses, Objective, by_group, measures
from align.preference.logps import token_logps
from align.preference.losses.inputs import Lists
from align.preference.starting_policy import StartingPolicy


class Scored(NamedTuple):
    """Losses per group with gradient, and metrics per group without, (G,) each."""

    losses: Tensor
    measures: dict[str, Tensor]


def score(
    model: nn.Module,
    head: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    objective: Objective,
    start: StartingPolicy | None = None,
) -> Scored:
    """Return the losses and metrics of a batch.

    Args:
        model: the policy, in any wrapper.
        head: its output embeddings.
        batch: from ``PreferenceCollator``, on the model's device.
        objective: the loss.
        reference_policy: the live reference; None if its log-probabilities are in the batch or not needed.
    """
    reference = batch.get("reference") if start is None else start.logps(model, head, batch)
    # After the reference: its weight swap needs that no autograd graph of the policy is alive.
    logps = token_logps(model, head, batch)
    lists = lists_of(logps, reference, batch)
    found: GroupLosses = objective(lists)
    return Scored(found.losses, measures(lists, found, logps, reference, batch["sizes"]))


def lists_of(logps: Tensor, reference: Tensor | None, batch: Mapping[str, Tensor]) -> Lists:
    """Return the loss inputs (G, K), from token log-probabilities (C, T)."""
    sizes = batch["sizes"]
    return Lists(
        logps=by_group(logps.sum(1), sizes),
        lengths=by_group(batch["lengths"], sizes),
        scores=batch["scores"],
        reference_logps=None if reference is None else by_group(reference.sum(1), sizes),
    )
