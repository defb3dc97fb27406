"""A block after which a model is as it was: what the probes do must not change the run by one bit."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Switch dropout off while the block lasts; then restore modes and random states, and drop gradients."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)
