"""Metrics of completions: reward, KL to the reference, length, EOS rate, entropy, perplexity."""

import numpy as np
import torch

from align.rl.completions import ScoredCompletions
from align.rl.maths.masked import masked_mean
from align.rl.token_stats import TokenStats, token_mask


def completion_metrics(completions: ScoredCompletions) -> dict[str, float]:
    """Return means over completions: reward and its sources, length, EOS rate, unique fraction."""
    lengths_C = completions.lengths.double()
    by_source = {
        f"rewards/{name}": float(np.mean(scores)) for name, scores in completions.scores.by_source.items()
    }
    return {
        "objective/reward": float(np.mean(completions.scores.total)),
        **(by_source if len(by_source) > 1 else {}),
        "val/completion_length": float(lengths_C.mean()),
        "val/eos_rate": float(completions.ended_with_eos.double().mean()),
        "val/unique_fraction": len(set(completions.texts)) / len(completions.texts),
        "val/length_reward_corr": correlation(lengths_C.numpy(), np.asarray(completions.scores.total)),
    }


def kl_metrics(completions: ScoredCompletions, stats: TokenStats) -> dict[str, float]:
    """Return KL to the reference (k1, nats per completion), entropy per token, and reference perplexity.

    The perplexity is that of the completions under the reference model: high for text it would not generate.
    """
    mask_CT = token_mask(completions.lengths, stats.logps.shape[1])
    # Both are 0 after the end of a completion, so the sum needs no mask.
    kl = (stats.logps - stats.reference_logps).double().sum(1).mean()
    return {
        "objective/kl_per_completion": float(kl),
        "policy/entropy": float(masked_mean(stats.entropies, mask_CT)),
        "val/ref_perplexity": float(torch.exp(-masked_mean(stats.reference_logps, mask_CT))),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's r; 0 if either input is constant."""
    scale = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / scale) if scale else 0.0
