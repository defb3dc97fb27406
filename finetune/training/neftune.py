r"""NEFTune: uniform noise on the embeddings of what is read, in training alone.

Jain et al. 2023 (arXiv 2310.05914), algorithm 1: X' = X + (alpha / sqrt(L d)) u, u ~ U(-1, 1)^(L x d), with
L the row's own tokens and d the width. transformers and TRL count padding into L, so that their noise
depends on the row's neighbours; here it does not, and packed rows have the noise of padded ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(
    embeddings: nn.Module, alpha: float | None, batch: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add the noise to whatever the embeddings give while the block lasts; without alpha change nothing.

    The noise comes from torch's own generator, whose state is in every checkpoint.

    Args:
        embeddings: the model's input embeddings.
        alpha: size of the noise.
        batch: what a collator gives.
    """
    if alpha is None:
        yield
        return
    lengths = row_lengths(batch)

    def add_noise(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        size = alpha / torch.sqrt(lengths * output.shape[-1])
        noise = torch.empty_like(output).uniform_(-1.0, 1.0)
        return output + noise * size.unsqueeze(-1).to(output.dtype)

    handle = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def row_lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """Return for each token of a batch the tokens of the row (of a packed line: of the text) it stands in.

    Args:
        batch: with ``attention_mask`` (padded) or ``position_ids`` (packed) of shape (lines, columns).

    Returns:
        (lines, columns), float; padding counts as a text of its own where lines are packed.
    """
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        return mask.sum(dim=1, keepdim=True).expand_as(mask).float()
    positions = batch["position_ids"]
    number = (positions == 0).cumsum(dim=1) - 1
    counts = torch.zeros_like(number).scatter_add_(1, number, torch.ones_like(number))
    return counts.gather(1, number).float()
