"""Several rewards of a reply made into one number."""

from collections.abc import Mapping, Sequence

import numpy as np

Numbers = np.ndarray
"""One number a reply: (N,) float64."""


def weighted_sum(parts: Mapping[str, Numbers], weights: Mapping[str, float]) -> Numbers:
    """Return r = sum_i w_i r_i (Glaese et al. 2022, arXiv 2209.14375, section 2.6: preferences and rules).

    Args:
        parts: (N,) of each reward.
        weights: how many times each counts.
    """
    return np.asarray(sum(weights[name] * values for name, values in parts.items()))


def piecewise(helpfulness: Numbers, safety: Numbers, risky: Sequence[bool], *, below: float) -> Numbers:
    """Return Llama 2's reward before it is whitened (arXiv 2307.09288, section 3.2.3).

    R_c = R_s where the prompt is risky or s(R_s) < 0.15, else R_h; s is the sigmoid. The paper's R are
    probabilities and it takes their logit at the end; here they stay logits.

    Args:
        helpfulness: (N,) scores.
        safety: (N,) scores.
        risky: (N,) whether each prompt may lead to unsafe replies.
        below: the threshold, 0.15 in the paper.
    """
    threshold = np.log(below / (1 - below))  # s(x) < below
    return np.where(np.asarray(risky, dtype=bool) | (safety < threshold), safety, helpfulness)


def length_cost(lengths: Sequence[int], *, per_token: float, free: int) -> Numbers:
    """Return what replies lose for their tokens beyond ``free``, 0 or below: (N,)."""
    beyond: Numbers = np.maximum(np.asarray(lengths, dtype=np.float64) - free, 0.0)
    return -per_token * beyond
