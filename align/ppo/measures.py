"""Metrics of PPO updates: explained variance, approx_kl (k3), means over tokens."""

from collections.abc import Sequence
from math import isfinite

import torch

from align.rl.maths.kl import kl_terms
from align.rl.maths.losses import explained_variance
from align.rl.reading import token_mask

Totals = tuple[int, dict[str, float]]
"""Number of tokens, and the sum of each metric over them."""


def of_values(values: torch.Tensor, returns: torch.Tensor, lengths: torch.Tensor) -> dict[str, float]:
    """Return the explained variance: 1 perfect, 0 as good as a constant; empty if all returns are equal."""
    mask = token_mask(lengths, values.shape[1])
    found = float(explained_variance(values, returns, mask))
    return {"explained_variance": found} if isfinite(found) else {}


def from_sampler(old_logps: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return approx_kl = KL(old policy || new policy) per token by k3, (C, T), without gradient.

    The tokens were sampled from the old policy, so r - 1 - log r with r = new / old is never negative, and a
    token that has become impossible counts with its logarithm: -log(e^-20) - 1 = 19, and 2 - 1 - log 2.

    >>> then, now = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-21.0, -0.3068528]])
    >>> from_sampler(then, now, torch.tensor([[True, True]]))
    tensor([[19.0000,  0.3069]])
    """
    return kl_terms(old_logps, logps.detach(), estimator="k3").masked_fill(~mask, 0.0)


class TokenMeans:
    """Running sums of per-token metrics over micro-batches, until ``take`` resets them."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.tokens = 0

    def add(self, tables: dict[str, torch.Tensor], mask: torch.Tensor) -> None:
        """Add (C, T) tensors; masked-out entries do not count."""
        for name, table in tables.items():
            total = float(table.detach().masked_fill(~mask, 0).double().sum())
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.tokens += int(mask.sum())

    def take(self) -> Totals:
        """Return the number of tokens and the sums, and reset both."""
        found = self.tokens, self.sums
        self.sums, self.tokens = {}, 0
        return found


def means_of(parts: Sequence[Totals]) -> dict[str, float]:
    """Return the means over the tokens of all processes, which have the same metrics.

    >>> means_of([(3, {"ratio": 3.0}), (1, {"ratio": 2.0})])
    {'ratio': 1.25}
    """
    tokens = max(1, sum(count for count, _ in parts))
    return {name: sum(sums[name] for _, sums in parts) / tokens for name in parts[0][1]}
