"""Causal LM loss of a batch's labels: target shift, LM head at labeled positions, chunked cross-entropy.

With a vocabulary of 32k to 256k the head is a large part of a small model's compute, and its logits most of a
large one's memory, while in instruction tuning often less than half of the positions carry loss. A hook drops
the other hidden states before the head; the model still does its own scaling and soft-capping of the logits.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finetune.data.collate import IGNORE_INDEX, Collator
from finetune.data.dataset import TokenizedRows
from finetune.distributed.collectives import all_gather_object, shard_padded
from finetune.lm_head import logits_at

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

    Equal to 1/2 sum (p - q)(log p - log q); AdaMix (arXiv 2205.12410, equation 5). The gradient goes through
    both distributions, as in the equation; the authors' code detaches the target of each KL, and for language
    models multiplies the sum by 100.

    Args:
        logits_NV: (N, V) logits, any floating dtype.
        other_logits_NV: logits of the same shape.
    """
    logp_NV, logq_NV = logits_NV.float().log_softmax(-1), other_logits_NV.float().log_softmax(-1)
    return ((logp_NV.exp() - logq_NV.exp()) * (logp_NV - logq_NV)).sum() / 2


def output_head(model: PreTrainedModel) -> nn.Module:
    """Return a model's LM head."""
    head: nn.Module | None = model.get_output_embeddings()
    assert head is not None, f"{type(model).__name__} has no output embeddings"
    return head


def completion_loss_sum(
    model: nn.Module,
    head: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    num_passes: int = 1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the summed negative log-likelihood of a batch's labels.

    Args:
        model: causal model in any wrapper.
        head: its output embeddings.
        batch: a collator's output; ``labels`` and ``row_ids`` are not passed to the model.
        num_passes: 2 runs the batch twice and adds the symmetric KL divergence of the two predictions
            (AdaMix, arXiv 2205.12410, equation 5).
        label_smoothing: probability mass of the target that is spread over the vocabulary.
    """
    predict_mask_BT, targets_N = loss_positions(batch["labels"])
    forward = {key: value for key, value in batch.items() if key not in ("labels", "row_ids")}
    logits_NV = logits_at(model, head, forward, predict_mask_BT)
    loss = cross_entropy_sum(logits_NV, targets_N, label_smoothing=label_smoothing)
    if num_passes == 1:
        return loss
    assert num_passes == 2
    return loss + symmetric_kl_sum(logits_NV, logits_at(model, head, forward, predict_mask_BT))


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: TokenizedRows, collate: Collator, *, batch_size: int) -> float:
    """Return the mean loss per label over held-out rows, which are sharded over ranks; no logits are stored.

    Args:
        model: causal model in any wrapper.
        rows: the held-out dataset.
        collate: padded or packed.
        batch_size: rows per forward pass.
    """
    head = output_head(model)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    # Rows of similar length share a batch: less padding.
    order = np.argsort(rows.lengths, kind="stable").tolist()
    total = 0.0
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for row_ids, is_real in shard_padded(batches):
        batch = collate([rows[index] for index in row_ids])
        on_device = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        # Summed, and divided once by all labels: a mean of batch means would weigh short batches more.
        total += float(completion_loss_sum(model, head, on_device)) * is_real
    model.train(training)
    return sum(all_gather_object(total)) / rows.num_trained
