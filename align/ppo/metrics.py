"""Metrics of PPO updates: explained variance, approx_kl (k3), means over tokens."""

from collections.abc import Sequence
from math import isfinite

import torch

from align.rl.maths.kl import kl_terms
from align.rl.maths.losses import explained_variance
from align.rl.token_stats import token_mask

TokenTotals = tuple[int, dict[str, float]]
"""Number of tokens, and the sum of each metric over them."""


def value_metrics(
    values_CT: torch.Tensor, returns_CT: torch.Tensor, lengths_C: torch.Tensor
) -> dict[str, float]:
    """Return the explained variance: 1 perfect, 0 as good as a constant; empty if all returns are equal."""
    mask_CT = token_mask(lengths_C, values_CT.shape[1])
    # Equal returns give NaN or -inf, which JSON cannot hold.
    variance_explained = float(explained_variance(values_CT, returns_CT, mask_CT))
    return {"value/explained_variance": variance_explained} if isfinite(variance_explained) else {}


def approx_kl(old_logps_CT: torch.Tensor, logps_CT: torch.Tensor, mask_CT: torch.Tensor) -> torch.Tensor:
    """Return approx_kl = KL(old policy || new policy) per token by k3, (C, T), without gradient.

    The tokens were sampled from the old policy, so r - 1 - log r with r = new / old is never negative, and a
    token that has become impossible counts with its logarithm: -log(e^-20) - 1 = 19, and 2 - 1 - log 2.

    >>> then, now = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-21.0, -0.3068528]])
    >>> approx_kl(then, now, torch.tensor([[True, True]]))
    tensor([[19.0000,  0.3069]])
    """
    return kl_terms(old_logps_CT, logps_CT.detach(), estimator="k3").masked_fill(~mask_CT, 0.0)


class TokenMetricAverager:
    """Running sums of per-token metrics over micro-batches, until ``take`` resets them."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.num_tokens = 0

    def add(self, metrics: dict[str, torch.Tensor], mask_CT: torch.Tensor) -> None:
        """Add (C, T) tensors; masked-out entries do not count."""
        for name, values_CT in metrics.items():
            # Filled and not multiplied by the mask: masked-out entries may be NaN. In double: sums get long.
            total = float(values_CT.detach().masked_fill(~mask_CT, 0).double().sum())
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.num_tokens += int(mask_CT.sum())

    def take(self) -> TokenTotals:
        """Return the number of tokens and the sums, and reset both."""
        totals = self.num_tokens, self.sums
        self.sums, self.num_tokens = {}, 0
        return totals


def mean_over_tokens(totals: Sequence[TokenTotals]) -> dict[str, float]:
    """Return the means over the tokens of all processes, which have the same metrics.

    >>> mean_over_tokens([(3, {"ratio": 3.0}), (1, {"ratio": 2.0})])
    {'ratio': 1.25}
    """
    # Divided once, over all processes: a mean of means would weight short micro-batches too much.
    num_tokens = max(1, sum(count for count, _ in totals))
    return {name: sum(sums[name] for _, sums in totals) / num_tokens for name in totals[0][1]}
