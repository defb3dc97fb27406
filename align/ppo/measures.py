"""What is watched of replies: reward, distance, length, ends, entropy; for people and for stop rules."""

from math import isfinite

import numpy as np
import torch

from align.ppo.episodes import token_mask
from align.ppo.experience import Replies, Said
from align.rl.maths.kl import kl_terms
from align.rl.maths.losses import explained_variance
from align.rl.maths.masked import masked_mean


def of_replies(replies: Replies) -> dict[str, float]:
    """Return means over replies: reward and its parts, tokens, shares that ended and that differ."""
    lengths = replies.lengths.double()
    found = {f"reward_{name}": float(np.mean(part)) for name, part in replies.judged.parts.items()}
    return {
        "reward": float(np.mean(replies.judged.total)),
        **(found if len(found) > 1 else {}),
        "length": float(lengths.mean()),
        "ends": float(replies.stopped.double().mean()),
        "distinct": len(set(replies.texts)) / len(replies.texts),
        "length_reward": correlation(lengths.numpy(), np.asarray(replies.judged.total)),
    }


def of_distance(replies: Replies, said: Said) -> dict[str, float]:
    """Return the distance from the start, nats a reply (k1), and entropy and perplexity a token.

    The perplexity is that of the replies under the start: text that it would not write has a high one.
    """
    mask = token_mask(replies.lengths, said.logps.shape[1])
    kl = (said.logps - said.reference_logps).double().sum(1).mean()
    return {
        "kl": float(kl),
        "entropy": float(masked_mean(said.entropies, mask)),
        "perplexity": float(torch.exp(-masked_mean(said.reference_logps, mask))),
    }


def of_values(values: torch.Tensor, returns: torch.Tensor, lengths: torch.Tensor) -> dict[str, float]:
    """Return how well values foretold returns: 1 all of it, 0 as a constant would; none if all are equal."""
    mask = token_mask(lengths, values.shape[1])
    found = float(explained_variance(values, returns, mask))
    return {"explained_variance": found} if isfinite(found) else {}


def from_sampler(old_logps: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return KL(policy that sampled || policy now) of each token, (episodes, tokens), by k3; no gradient.

    The tokens are the former's, so that r - 1 - log r with r = now / then is never negative, and a token that
    has become impossible counts by its logarithm: -log(e^-20) - 1 = 19, and 2 - 1 - log 2.

    >>> then, now = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-21.0, -0.3068528]])
    >>> from_sampler(then, now, torch.tensor([[True, True]]))
    tensor([[19.0000,  0.3069]])
    """
    return kl_terms(old_logps, logps.detach(), estimator="k3").masked_fill(~mask, 0.0)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Pearson's r; 0 where one of the two does not vary."""
    spread = one.std() * other.std()
    return float(((one - one.mean()) * (other - other.mean())).mean() / spread) if spread else 0.0


class TokenMeans:
    """Means over tokens of all forward passes since they were last taken."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.tokens = 0

    def add(self, tables: dict[str, torch.Tensor], mask: torch.Tensor) -> None:
        """Add tables of (episodes, tokens); only what the mask shows counts."""
        for name, table in tables.items():
            total = float(table.detach().masked_fill(~mask, 0).double().sum())
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.tokens += int(mask.sum())

    def take(self) -> dict[str, float]:
        """Return the means and begin anew."""
        means = {name: value / max(1, self.tokens) for name, value in self.sums.items()}
        self.sums, self.tokens = {}, 0
        return means
