"""Whether all processes have trained the same weights."""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from finetune.recipe.errors import Problem
from finetune.training.preflight.ticks import Tick, failed


def trained_digest(model: nn.Module) -> str:
    """Return a checksum of every number that is trained, for weights that each process holds whole."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            numbers = weight.detach().contiguous().cpu().reshape(-1)
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def same_tick(digests: Sequence[str]) -> Tick:
    """Check that the trained weights are equal, to the bit, in all processes."""
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        found = f"process {others[0]} ended with other trained weights than process 0"
        expected = f"the same in all {len(digests)}"
        problem = Problem("train.processes", found, expected, "train.processes=1; this is a fault of ours")
        return failed("processes", problem)
    return Tick("processes", f"the trained weights are equal in all {len(digests)}, to the bit")
