"""What is watched of replies: reward, distance, length, ends, entropy; for people and for stop rules."""

import numpy as np
import torch

from align.rl.maths.masked import masked_mean
from align.rl.reading import Said, token_mask
from align.rl.replies import Replies


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


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Pearson's r; 0 where one of the two does not vary."""
    spread = one.std() * other.std()
    return float(((one - one.mean()) * (other - other.mean())).mean() / spread) if spread else 0.0
