r"""NEFTune: uniform noise on the input embeddings during training.

Jain et al. 2023 (arXiv 2310.05914), algorithm 1: X' = X + (alpha / sqrt(L d)) u, u ~ U(-1, 1)^(L x d), with
L the row's tokens and d the hidden size. transformers and TRL count padding in L, so that their noise depends
on the other rows of the batch; here it does not, and packed rows have the noise of padded ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(
    embeddings: nn.Module, alpha: float | None, batch: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add NEFTune noise to the embeddings' output inside the block; no change without alpha.

    Args:
        embeddings: the model's input embeddings.
        alpha: scale of the noise.
        batch: a collator's output.
    """
    if alpha is None:
        yield
        return
    lengths = row_lengths(batch)

    def add_noise(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        size = alpha / torch.sqrt(lengths * output.shape[-1])
        noise = torch.empty_like(output).uniform_(-1.0, 1.0)  # torch's global RNG, saved in each checkpoint
        return output + noise * size.unsqueeze(-1).to(output.dtype)

    handle = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def row_lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """Return for each token the length of its row (in a packed batch: of its text).

    Args:
        batch: with ``attention_mask`` (padded) or ``position_ids`` (packed) of shape (B, T).

    Returns:
        (B, T), float; in a packed batch padding counts as a separate text.
    """
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        return mask.sum(dim=1, keepdim=True).expand_as(mask).float()
    positions = batch["position_ids"]
    # A position id of 0 begins a text of a packed row.
    number = (positions == 0).cumsum(dim=1) - 1
    counts = torch.zeros_like(number).scatter_add_(1, number, torch.ones_like(number))
    return counts.gather(1, number).float()
