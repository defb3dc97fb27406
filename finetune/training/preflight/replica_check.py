"""Replica check: all ranks end with equal trained weights (DDP, ZeRO-1, ZeRO-2)."""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from finetune.recipe.errors import Problem
from finetune.training.preflight.checks import CheckResult, failed


def trained_digest(model: nn.Module) -> str:
    """Return a checksum of all trained weights, which each rank holds in full."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            values = weight.detach().contiguous().cpu().reshape(-1)
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            # As bytes, since NumPy has no bfloat16; with name and shape, so that equal bytes of two tensors
            # differ.
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_replicas_equal(digests: Sequence[str]) -> CheckResult:
    """Check that the trained weights are equal bit for bit on all ranks."""
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        actual = f"the trained weights of rank {differing[0]} differ from rank 0's"
        expected = f"equal weights on all {len(digests)} ranks"
        problem = Problem(
            "train.num_processes", actual, expected, "train.num_processes=1; this is a bug in llm-align"
        )
        return failed("processes", problem)
    return CheckResult("processes", f"the trained weights of all {len(digests)} are equal bit for bit")
