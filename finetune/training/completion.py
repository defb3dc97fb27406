"""Cross-entropy of a batch's labels, and the held-out loss."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.collate import Collator
from finetune.data.dataset import TokenizedRows
from finetune.training.head import logits_at, output_head
from finetune.training.loss import cross_entropy_sum, loss_positions, symmetric_kl_sum
from finetune.training.processes import everyones, share_in_step


def completion_loss_sum(
    model: nn.Module,
    head: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    passes: int = 1,
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
    positions, targets = loss_positions(batch["labels"])
    forward = {key: value for key, value in batch.items() if key not in ("labels", "rows")}
    logits = logits_at(model, head, forward, positions)
    loss = cross_entropy_sum(logits, targets, label_smoothing=label_smoothing)
    if passes == 1:
        return loss
    assert passes == 2
    return loss + symmetric_kl_sum(logits, logits_at(model, head, forward, positions))


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: TokenizedRows, collate: Collator, *, lines: int) -> float:
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
    order = np.argsort(rows.lengths, kind="stable").tolist()  # similar lengths together: least padding
    total = 0.0
    batches = [order[start : start + lines] for start in range(0, len(order), lines)]
    for part, counts in share_in_step(batches):
        batch = collate([rows[index] for index in part])
        on_device = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        total += float(completion_loss_sum(model, head, on_device)) * counts
    model.train(training)
    return sum(everyones(total)) / rows.num_trained
