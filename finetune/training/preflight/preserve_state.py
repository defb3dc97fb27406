"""Preserve train/eval modes, gradients and RNG state around probes: they must not change a bit of the run."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Disable dropout inside the block; then restore train/eval modes and RNG states, and drop gradients."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    # Devices are named, because torch's default, all of them, warns where there are many.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()  # dropout masks would make equal forward passes differ
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for module, mode in modes:
                # Not `.train(mode)`, which would set all submodules too.
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)
