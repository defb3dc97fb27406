"""One forward pass over groups: log-probabilities under policy and reference, losses, what is watched."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from align.dpo.objective import GroupLosses, Objective, by_group, measures
from align.preference.logps import token_logps
from align.preference.losses.inputs import Lists
from finetune.training.model import DTYPES


class Scored(NamedTuple):
    """Losses of the groups with gradient, and measures of them without, each of shape (groups,)."""

    losses: Tensor
    measures: dict[str, Tensor]


class StartingPolicy:
    """The policy as it starts, for a live reference: a copy of its trained weights, beside one base.

    The copies take the weights' place while the reference is computed. That serves every adapter, virtual
    tokens and one that a run began with included, and leaves adapters, checkpoints and gradients alone.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copy what is trained; call it before a checkpoint is loaded."""
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.copies = [(weight, weight.detach().clone()) for weight in trained]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model be the starting policy while the block lasts; no graph of a forward may be alive."""
        now = [weight.data for weight, _ in self.copies]
        try:
            for weight, start in self.copies:
                weight.data = start
            yield
        finally:
            for (weight, _), data in zip(self.copies, now, strict=True):
                weight.data = data
            torch.clear_autocast_cache()  # else the policy's pass could find the start's weights in there

    @torch.no_grad()
    def logps(self, model: nn.Module, head: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return log-probabilities of the completions' tokens under the start, without dropout."""
        training = model.training
        model.eval()
        with self.in_place():
            found = token_logps(model, head, batch)
        model.train(training)
        return found


def arithmetic(model: nn.Module, precision: str) -> torch.autocast:
    """Return the arithmetic that Accelerate gives a model's forward pass once it trains."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=DTYPES[precision], enabled=precision != "float32")


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
