"""The policy as it starts: what a live reference is computed with, on the policy's own base."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from align.preference.logps import token_logps
from finetune.training.model import DTYPES


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
