"""Metrics of completions: reward, KL to the reference, length, EOS rate, entropy, perplexity."""

import numpy as np
import torch

from align.rl.maths.masked import masked_mean
from align.rl.reading import Said, token_mask
from align.rl.replies import Replies


def of_replies(replies: Replies) -> dict[str, float]:
    """Return means over completions: reward and its sources, length, EOS rate, unique fraction."""
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
    """Return KL to the reference (k1, nats per completion), entropy per token, and reference perplexity.

    The perplexity is that of the completions under the reference model: high for text it would not generate.
    """
    mask = token_mask(replies.lengths, said.logps.shape[1])
    kl = (said.logps - said.reference_logps).double().sum(1).mean()
    return {
        "kl": float(kl),
        "entropy": float(masked_mean(said.entropies, mask)),
        "perplexity": float(torch.exp(-masked_mean(said.reference_logps, mask))),
    }


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Pearson's r; 0 if either input is constant."""
    spread = one.std() * other.std()
    return float(((one - one.mean()) * (other - other.mean())).mean() / spread) if spread else 0.0
