"""Cross-entropy of a batch's labels, and the held-out loss."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.collate import Collator
from finetune.data.dataset import TokenizedRows
from finetune.distributed.collectives import all_gather_object, shard_padded
from finetune.training.head import logits_at, output_head
from finetune.training.loss import cross_entropy_sum, loss_positions, symmetric_kl_sum


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
        batch: a collator's output; ``labels`` and ``rows`` are not passed to the model.
        num_passes: 2 runs the batch twice and adds the symmetric KL divergence of the two predictions
            (AdaMix, arXiv 2205.12410, equation 5).
        label_smoothing: probability mass of the target that is spread over the vocabulary.
    """
    predict_mask_BT, targets_N = loss_positions(batch["labels"])
    forward = {key: value for key, value in batch.items() if key not in ("labels", "rows")}
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
