"""Combine several rewards of a completion: weighted sum, Llama 2's piecewise reward, length penalty."""

from collections.abc import Mapping, Sequence

import numpy as np

Scores = np.ndarray
"""One number per completion: (C,) float64."""


def weighted_sum(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """Return r = sum_i w_i r_i (Glaese et al. 2022, arXiv 2209.14375, section 2.6: preferences and rules).

    Args:
        scores: (C,) of each reward.
        weights: weight of each reward.
    """
    return np.asarray(sum(weights[name] * values for name, values in scores.items()))


def piecewise(
    helpfulness: Scores, safety: Scores, unsafe: Sequence[bool], *, safety_threshold: float
) -> Scores:
    """Return Llama 2's piecewise reward before whitening (arXiv 2307.09288, section 3.2.3).

    R_c = R_s if the prompt is unsafe or s(R_s) < 0.15, else R_h; s is the sigmoid. The paper's R are
    probabilities and it takes their logit at the end; here they stay logits.

    Args:
        helpfulness: (C,) scores.
        safety: (C,) scores.
        unsafe: (C,) whether each prompt may elicit unsafe replies.
        safety_threshold: in probability, 0.15 in the paper.
    """
    logit_threshold = np.log(safety_threshold / (1 - safety_threshold))  # s(x) < threshold, on logits
    return np.where(np.asarray(unsafe, dtype=bool) | (safety < logit_threshold), safety, helpfulness)


def length_penalty(lengths: Sequence[int], *, per_token: float, free_tokens: int) -> Scores:
    """Return the length penalty of tokens beyond ``free_tokens``: (C,), 0 or below."""
    excess: Scores = np.maximum(np.asarray(lengths, dtype=np.float64) - free_tokens, 0.0)
    return -per_token * excess
