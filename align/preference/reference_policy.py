"""Reference policy: a copy of the initial trained weights, swapped into the policy's own base model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from align.preference.logps import token_logps
from finetune.training.model import DTYPES


class ReferencePolicy:
    """The reference model of DPO, PPO and GRPO: the initial policy, sharing the frozen base with the policy.

    A copy of the initial trained weights is swapped in while reference log-probabilities are computed. That
    works with every adapter (also virtual tokens, or a parent run's) and touches no checkpoint or gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copy the trainable weights; call it before a checkpoint is loaded, which would overwrite them."""
        # The frozen base is shared: only trained weights are copied, a few MB for LoRA.
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.initial_weights = [(weight, weight.detach().clone()) for weight in trained]

    @contextmanager
    def as_active(self) -> Iterator[None]:
        """Make the model the reference policy inside the block; no autograd graph of it may be alive."""
        current = [weight.data for weight, _ in self.initial_weights]
        try:
            # `.data` is swapped and not the Parameter, which optimizer and adapter refer to.
            for weight, initial in self.initial_weights:
                weight.data = initial
            yield
        finally:
            for (weight, _), data in zip(self.initial_weights, current, strict=True):
                weight.data = data
            # Autocast caches casts by weight: the policy's forward pass would reuse the reference's.
            torch.clear_autocast_cache()

    @torch.no_grad()
    def logps(self, model: nn.Module, head: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the completions' token log-probabilities (C, T) under the reference, without dropout."""
        training = model.training
        model.eval()
        with self.as_active():
            logps_CT = token_logps(model, head, batch)
        model.train(training)
        return logps_CT


def autocast_for(model: nn.Module, precision: str) -> torch.autocast:
    """Return the autocast context that Accelerate runs the forward pass in during training."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=DTYPES[precision], enabled=precision != "float32")
