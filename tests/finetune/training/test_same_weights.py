"""The replica check compares the trained weights of all ranks bit for bit."""

import torch
from torch import nn

from finetune.training.preflight.same_weights import same_tick, trained_digest


def test_one_other_number_is_seen_and_the_process_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = trained_digest(model)
    assert same_tick([before, before]).problem is None
    with torch.no_grad():
        model.weight[1, 2] += 1e-6
    problem = same_tick([before, before, trained_digest(model)]).problem
    assert problem is not None and problem.found.startswith("the trained weights of rank 2 differ")


def test_frozen_weights_are_not_asked() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    before = trained_digest(model)
    model.weight.data += 1
    assert trained_digest(model) == before
