"""Check that training left the frozen base unchanged: checksums of sampled weights, before and after."""

import hashlib

import torch
from torch import Tensor, nn

from finetune.distributed.sharding import gathered_params, reshard
from finetune.recipe.errors import Problem
from finetune.training.preflight.checks import CheckResult, failed, first_few

SAMPLED_TENSORS, SAMPLED_ELEMENTS = 32, 4096
"""Number of frozen tensors that are sampled, and elements of each: some milliseconds for any model."""


def frozen_checksums(model: nn.Module) -> dict[str, str]:
    """Return the checksums of up to 32 frozen tensors, evenly spaced over the model."""
    reshard(model)
    frozen = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    stride = max(1, -(-len(frozen) // SAMPLED_TENSORS))
    checksums = {}
    for name, weight in frozen[::stride]:
        with gathered_params(weight) as (values,):
            checksums[name] = _tensor_checksum(values)
    return checksums


def _tensor_checksum(weight: Tensor) -> str:
    values = weight.reshape(-1)
    # A strided sample: hashing every weight would read the full model from the device, twice.
    sample = values[:: max(1, len(values) // SAMPLED_ELEMENTS)].contiguous().cpu()
    # Hashed as bytes: NumPy has no bfloat16.
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()


def check_base_unchanged(before: dict[str, str], after: dict[str, str]) -> CheckResult:
    """Check that training did not change the frozen weights."""
    if not before:
        return CheckResult("base", "full fine-tuning, no weight is frozen")
    changed = [name for name, checksum in before.items() if after.get(name) != checksum]
    if changed:
        actual = (
            f"{len(changed)} of {len(before)} frozen tensors changed during training: {first_few(changed)}"
        )
        expected = "a base unchanged bit for bit: the adapter has to fit other copies of it"
        repair = "train.engine_args={} and train.engine=native; if it persists, this is a bug in llm-align"
        return failed("base", Problem("model.base", actual, expected, repair))
    return CheckResult("base", f"unchanged bit for bit in {len(before)} sampled tensors")
