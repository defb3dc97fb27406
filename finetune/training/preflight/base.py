"""Check that training left the frozen base unchanged: checksums of sampled weights, before and after."""

import hashlib

import torch
from torch import Tensor, nn

from finetune.recipe.errors import Problem
from finetune.training.apart import settle, whole
from finetune.training.preflight.ticks import Tick, failed, some

TENSORS, NUMBERS = 32, 4096
"""Number of frozen tensors that are sampled, and elements of each: some milliseconds for any model."""


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Return the checksums of up to 32 frozen tensors, evenly spaced over the model."""
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
    # A strided sample: hashing every weight would read the full model from the device, twice.
    sample = numbers[:: max(1, len(numbers) // NUMBERS)].contiguous().cpu()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()


def unchanged(before: dict[str, str], after: dict[str, str]) -> Tick:
    """Check that training did not change the frozen weights."""
    if not before:
        return Tick("base", "full fine-tuning, no weight is frozen")
    changed = [name for name, checksum in before.items() if after.get(name) != checksum]
    if changed:
        found = f"{len(changed)} of {len(before)} frozen tensors changed during training: {some(changed)}"
        expected = "a base that is bit for bit unchanged, or the adapter fits no other copy of it"
        repair = "train.engine_args={} and train.engine=native; if it persists, this is a bug in llm-align"
        return failed("base", Problem("model.base", found, expected, repair))
    return Tick("base", f"unchanged bit for bit in {len(before)} sampled tensors")
