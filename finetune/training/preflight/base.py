"""Whether the frozen weights are what they were: fingerprints of a sample, before and after training."""

import hashlib

import torch
from torch import Tensor, nn

from finetune.recipe.errors import Problem
from finetune.training.apart import settle, whole
from finetune.training.preflight.ticks import Tick, failed, some

TENSORS, NUMBERS = 32, 4096
"""How many frozen tensors are looked at, and how many numbers of each: some milliseconds for any model."""


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Return a checksum for each of up to 32 frozen tensors, spread evenly over the model."""
    settle(model)
    frozen = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    every = max(1, -(-len(frozen) // TENSORS))
    found = {}
    for name, weight in frozen[::every]:
        with whole(weight) as (numbers,):
            found[name] = _checksum(numbers)
    return found


def _checksum(weight: Tensor) -> str:
    numbers = weight.reshape(-1)
    sample = numbers[:: max(1, len(numbers) // NUMBERS)].contiguous().cpu()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()


def unchanged(before: dict[str, str], after: dict[str, str]) -> Tick:
    """Check that training left the frozen weights alone."""
    if not before:
        return Tick("base", "the whole model was trained, nothing was frozen")
    changed = [name for name, checksum in before.items() if after.get(name) != checksum]
    if changed:
        found = f"{len(changed)} of {len(before)} frozen tensors changed while training: {some(changed)}"
        expected = "a base that is bit for bit what it was, or the adapter fits no other copy of it"
        repair = "train.engine_args={} and train.engine=native; if it stays, this is a fault of ours"
        return failed("base", Problem("model.base", found, expected, repair))
    return Tick("base", f"unchanged by training, to the bit, in {len(before)} tensors")
