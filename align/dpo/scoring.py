"""One forward pass over groups: log-probabilities under policy and reference, losses, what is watched."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from align.dpo.objective import GroupLosses, Objective, by_group, measures
from align.preference.logps import token_logps
from align.preference.losses.inputs import Lists
from align.preference.starting_policy import StartingPolicy


class Scored(NamedTuple):
    """Losses of the groups with gradient, and measures of them without, each of shape (groups,)."""

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
    """Return losses and measures of a batch.

    Args:
        model: the policy, in any wrapper.
        head: its output embeddings.
        batch: what ``PreferenceCollator`` gives, on the model's device.
        objective: what is minimised.
        start: where the reference is taken live; else it is in the batch, or not needed.
    """
    reference = batch.get("reference") if start is None else start.logps(model, head, batch)
    logps = token_logps(model, head, batch)
    lists = lists_of(logps, reference, batch)
    found: GroupLosses = objective(lists)
    return Scored(found.losses, measures(lists, found, logps, reference, batch["sizes"]))


def lists_of(logps: Tensor, reference: Tensor | None, batch: Mapping[str, Tensor]) -> Lists:
    """Return what losses look at, from log-probabilities of tokens: (completions, longest)."""
    sizes = batch["sizes"]
    return Lists(
        logps=by_group(logps.sum(1), sizes),
        lengths=by_group(batch["lengths"], sizes),
        scores=batch["scores"],
        reference_logps=None if reference is None else by_group(reference.sum(1), sizes),
    )
