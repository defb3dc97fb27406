"""The language-model loss, computed only where a label is. Pure tensor code; no recipe, no trainer."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
MAX_ELEMENTS = 2**26
"""Logits that are turned into float32 at a time: 256 MiB."""


def loss_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the model has to predict, and what.

    Args:
        labels: (lines, columns), a token's id where it is to be learnt, -100 elsewhere; never shifted.

    Returns:
        A mask of shape (lines, columns), true at t where the token at t + 1 is to be learnt, and the N
        targets in the order in which ``hidden[mask]`` gives the states that predict them.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask, labels[:, 1:][mask[:, :-1]]


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, max_elements: int = MAX_ELEMENTS
) -> Tensor:
    r"""Return the summed negative log-likelihood, -sum_n log softmax(logits_n)[target_n], in float32.

    With ``label_smoothing`` e the target is (1 - e) of the token and e / V of each of the V entries of the
    vocabulary (Szegedy et al. 2015, arXiv 1512.00567, section 7).

    Over a large vocabulary the softmax is taken chunk by chunk and recomputed in the backward pass, so that
    one chunk's float32 copy is alive at a time and not all of them.

    Args:
        logits: (N, vocabulary), any floating type.
        targets: (N,), token ids.
        label_smoothing: e, from 0 up to 1.
        max_elements: logits per chunk at most.
    """
    rows = max(1, max_elements // logits.shape[-1])
    if len(targets) <= rows:
        return _sum(logits, targets, label_smoothing)
    chunks = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    sums = [checkpoint(_sum, *chunk, label_smoothing, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum()


def _sum(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def symmetric_kl_sum(first: Tensor, second: Tensor) -> Tensor:
    r"""Return sum_n 1/2 (KL(p_n || q_n) + KL(q_n || p_n)), for the distributions of two passes.

    Equal to 1/2 sum (p - q)(log p - log q); AdaMix (arXiv 2205.12410, equation 5).

    Args:
        first: (N, vocabulary) logits, any floating type.
        second: logits of the same shape.
    """
    p, q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum() / 2
