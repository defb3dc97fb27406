"""Prompt encoders that PEFT lacks (gated prefix, progressive prompt), saved as prefix or soft prompt."""

import torch
from torch import Tensor, nn


class GatedPrefix(nn.Module):
    """A prefix with gates per layer and position: lambda_i sigmoid(a_ij) P_ij (layer i, position j).

    Input: positions (batch, tokens). Output: (batch, tokens, 2 * layers * width), keys and values in PEFT's
    order: for each layer the key, then the value.
    """

    def __init__(self, prefix: Tensor, *, layers: int) -> None:
        """Initialize so that the gated prefix is ``prefix``.

        Args:
            prefix: initial keys and values, (tokens, 2 * layers * width).
            layers: number of layers of the model.
        """
        super().__init__()
        tokens, size = prefix.shape
        self.layers = layers
        self.layer_gate = nn.Parameter(torch.ones(layers))
        self.position_gate = nn.Parameter(torch.zeros(tokens, layers))
        self.embedding = nn.Embedding(tokens, size)
        with torch.no_grad():
            self.embedding.weight.copy_(prefix / 0.5)  # sigmoid(0) = 1/2

    def forward(self, positions: Tensor) -> Tensor:
        """Return the gated prefix."""
        gates = self.layer_gate * torch.sigmoid(self.position_gate)
        prefix = self.embedding(positions).unflatten(-1, (self.layers, -1))
        gated: Tensor = gates[positions].unsqueeze(-1) * prefix
        return gated.flatten(-2)


class ProgressivePrompt(nn.Module):
    """A trainable prompt before the frozen prompts of earlier tasks.

    Input: positions (batch, tokens of all tasks). Output: (batch, tokens of all tasks, width), the new task's
    prompt first, then the earlier ones, latest first.
    """

    earlier: Tensor

    def __init__(self, new: Tensor, earlier: Tensor) -> None:
        """Take the new prompt's initial value (tokens, width) and the earlier prompts (tokens, width)."""
        super().__init__()
        self.embedding = nn.Embedding(*new.shape)
        with torch.no_grad():
            self.embedding.weight.copy_(new)
        # A buffer: moved and saved with the module, and not trained.
        self.register_buffer("earlier", earlier.clone())

    def forward(self, positions: Tensor) -> Tensor:
        """Return the prompts of all tasks at these positions."""
        return torch.cat([self.embedding.weight, self.earlier])[positions]
