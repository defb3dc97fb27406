"""Forward pass of DPO: policy and reference log-probabilities, group losses and metrics."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from align.dpo.objective import GroupLosses, PreferenceObjective, pad_by_group, preference_metrics
from align.preference.logps import token_logps
from align.preference.losses.inputs import Lists
from align.preference.reference_policy import ReferencePolicy


class ForwardLosses(NamedTuple):
    """Losses per group with gradient, and metrics per group without, (G,) each."""

    losses: Tensor
    metrics: dict[str, Tensor]


def forward_losses(
    model: nn.Module,
    head: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    objective: PreferenceObjective,
    reference_policy: ReferencePolicy | None = None,
) -> ForwardLosses:
    """Return the losses and metrics of a batch.

    Args:
        model: the policy, in any wrapper.
        head: its output embeddings.
        batch: from ``PreferenceCollator``, on the model's device.
        objective: the loss.
        reference_policy: the live reference; None if its log-probabilities are in the batch or not needed.
    """
    reference_CT = (
        batch.get("reference_logps")
        if reference_policy is None
        else reference_policy.logps(model, head, batch)
    )
    # After the reference: its weight swap needs that no autograd graph of the policy is alive.
    logps_CT = token_logps(model, head, batch)
    lists = to_lists(logps_CT, reference_CT, batch)
    group_losses: GroupLosses = objective(lists)
    return ForwardLosses(
        group_losses.losses, preference_metrics(lists, group_losses, logps_CT, reference_CT, batch["sizes"])
    )


def to_lists(logps_CT: Tensor, reference_CT: Tensor | None, batch: Mapping[str, Tensor]) -> Lists:
    """Return the loss inputs (G, K), from token log-probabilities (C, T)."""
    sizes = batch["sizes"]
    return Lists(
        logps=pad_by_group(logps_CT.sum(1), sizes),
        lengths=pad_by_group(batch["lengths"], sizes),
        scores=batch["scores"],
        reference_logps=None if reference_CT is None else pad_by_group(reference_CT.sum(1), sizes),
    )
