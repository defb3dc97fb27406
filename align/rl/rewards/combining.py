"""Combine several rewards of a completion: weighted sum, Llama 2's piecewise reward, length penalty."""

from collections.abc import Mapping, Sequence

import numpy as np

Numbers = np.ndarray
"""One number per completion: (C,) float64."""


def weighted_sum(parts: Mapping[str, Numbers], weights: Mapping[str, float]) -> Numbers:
    """Return r = sum_i w_i r_i (Glaese et al. 2022, arXiv 2209.14375, section 2.6: preferences and rules).

    Args:
        scores: (C,) of each reward.
        weights: weight of each reward.
    """
    return np.asarray(sum(weights[name] * values for name, values in parts.items()))


def piecewise(helpfulness: Numbers, safety: Numbers, risky: Sequence[bool], *, below: float) -> Numbers:
    """Return Llama 2's piecewise reward before whitening (arXiv 2307.09288, section 3.2.3).

    R_c = R_s if the prompt is unsafe or s(R_s) < 0.15, else R_h; s is the sigmoid. The paper's R are
    probabilities and it takes their logit at the end; here they stay logits.

    Args:
        helpfulness: (C,) scores.
        safety: (C,) scores.
        unsafe: (C,) whether each prompt may elicit unsafe replies.
        safety_threshold: in probability, 0.15 in the paper.
    """
    threshold = np.log(below / (1 - below))  # s(x) < threshold, on logits
    return np.where(np.asarray(risky, dtype=bool) | (safety < threshold), safety, helpfulness)


def length_cost(lengths: Sequence[int], *, per_token: float, free: int) -> Numbers:
    """Return the length penalty of tokens beyond ``free_tokens``: (C,), 0 or below."""
    beyond: Numbers = np.maximum(np.asarray(lengths, dtype=np.float64) - free, 0.0)
    return -per_token * beyond
