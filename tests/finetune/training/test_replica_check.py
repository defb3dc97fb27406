"""The replica check compares the trained weights of all ranks bit for bit."""

import torch
from torch import nn

from finetune.training.preflight.replica_check import check_replicas_equal, trained_digest


def test_a_differing_rank_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = trained_digest(model)
    assert check_replicas_equal([before, before]).problem is None
    with torch.no_grad():
        model.weight[1, 2] += 1e-6
    problem = check_replicas_equal([before, before, trained_digest(model)]).problem
    assert problem is not None and problem.actual.startswith("the trained weights of rank 2 differ")


def test_frozen_weights_are_ignored() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    before = trained_digest(model)
    model.weight.data += 1
    assert trained_digest(model) == before
