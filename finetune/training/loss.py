"""Causal LM loss at labeled positions: target shift, chunked cross-entropy, symmetric KL. Pure tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.data.collate import IGNORE_INDEX

MAX_LOGITS_PER_CHUNK = 2**26
"""Logits that are upcast to float32 at a time: 256 MiB."""


def loss_positions(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions that predict a label, and the labels.

    Args:
        labels_BT: (B, T), the token id where it is trained, -100 elsewhere; not shifted.

    Returns:
        A (B, T) mask, true at t if the token at t + 1 is trained, and the N targets in the order of
        ``hidden[mask]``.
    """
    mask_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    # The state at t predicts the token at t + 1: the mask is shifted left by one, the labels are not.
    mask_BT[:, :-1] = labels_BT[:, 1:] != IGNORE_INDEX
    return mask_BT, labels_BT[:, 1:][mask_BT[:, :-1]]


def cross_entropy_sum(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    label_smoothing: float = 0.0,
    max_logits: int = MAX_LOGITS_PER_CHUNK,
) -> Tensor:
    r"""Return the summed negative log-likelihood, -sum_n log softmax(logits_n)[target_n], in float32.

    With ``label_smoothing`` e the target is (1 - e) of the token and e / V of each of the V entries of the
    vocabulary (Szegedy et al. 2015, arXiv 1512.00567, section 7).

    Args:
        logits_NV: (N, V), any floating dtype.
        targets_N: (N,), token ids.
        label_smoothing: e, from 0 up to 1.
        max_logits: maximum logits per chunk.
    """
    chunk_size = max(1, max_logits // logits_NV.shape[-1])
    if len(targets_N) <= chunk_size:
        return _chunk_sum(logits_NV, targets_N, label_smoothing)
    # Chunks are recomputed in the backward pass: only one chunk's float32 copy is alive at a time.
    chunks = zip(torch.split(logits_NV, chunk_size), torch.split(targets_N, chunk_size), strict=True)
    sums = [checkpoint(_chunk_sum, *chunk, label_smoothing, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum()


def _chunk_sum(logits_NV: Tensor, targets_N: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum", label_smoothing=label_smoothing)


def symmetric_kl_sum(logits_NV: Tensor, other_logits_NV: Tensor) -> Tensor:
    r"""Return sum_n 1/2 (KL(p_n || q_n) + KL(q_n || p_n)) of two forward passes' distributions.

    Equal to 1/2 sum (p - q)(log p - log q); AdaMix (arXiv 2205.12410, equation 5).

    Args:
        logits_NV: (N, V) logits, any floating dtype.
        other_logits_NV: logits of the same shape.
    """
    logp_NV, logq_NV = logits_NV.float().log_softmax(-1), other_logits_NV.float().log_softmax(-1)
    return ((logp_NV.exp() - logq_NV.exp()) * (logp_NV - logq_NV)).sum() / 2
