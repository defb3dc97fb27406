r"""KTO loss on completions labeled good or bad, and its reference point z (KL estimate).

In the equations: r(y) = log pi(y|x) - log ref(y|x), over all tokens; z is the reference point, the same for
all rows of a forward pass; s the logistic function.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class KTOOutput(NamedTuple):
    """Loss per completion, with gradient, and its implicit reward beta r(y), detached: (rows,) each."""

    losses: Tensor
    rewards: Tensor


def kto(
    logratios: Tensor,
    desirable: Tensor,
    *,
    reference_point: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOOutput:
    """Return w_D (1 - s(beta (r - z))) of good completions and w_U (1 - s(beta (z - r))) of bad ones.

    Kahneman-Tversky optimization, arXiv 2402.01306, equation 8: lambda_y - v(x, y).

    Args:
        logratios: (rows,) r of each completion.
        desirable: (rows,) whether the completion is good.
        reference_point: () z, without gradient.
        beta: risk aversion, above 0.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.
    """
    gains = beta * (logratios - reference_point)
    # 1 - s(x) as s(-x), which does not cancel.
    losses = torch.where(
        desirable, desirable_weight * torch.sigmoid(-gains), undesirable_weight * torch.sigmoid(gains)
    )
    return KTOOutput(losses, (beta * logratios).detach())


@torch.no_grad()
def reference_point(mismatched_logratios: Tensor) -> Tensor:
    """Return z: the mean of r over mismatched prompts and completions, clamped at 0.

    arXiv 2402.01306, section 3.3: a cheap, biased estimate of KL(pi || ref), which only separates gains from
    losses.

    Args:
        mismatched_logratios: (rows,).
    """
    return mismatched_logratios.mean().clamp(min=0)


def mismatched_rows(prompts: Sequence[Hashable], size: int) -> list[int]:
    """Return for each row the row whose completion it is paired with to estimate z.

    Rows of a forward pass exchange completions: each takes that of the row before it, the first that of the
    last. Rows with the same prompt are skipped (the two halves of a pair have one); if all have it, a row of
    another forward pass is taken. If all rows of the data have one prompt, as a few held-out ones may, each
    takes its neighbor's.

    Args:
        prompts: each row's prompt, in training order.
        size: rows of a forward pass.

    >>> mismatched_rows(["a", "b", "c", "d", "d", "e"], size=3)
    [2, 0, 1, 5, 5, 4]
    >>> mismatched_rows(["a", "a", "b"], size=2)
    [2, 2, 1]
    """
    return [_mismatched_row(prompts, row, size) for row in range(len(prompts))]


def _mismatched_row(prompts: Sequence[Hashable], row: int, size: int) -> int:
    start = row // size * size
    batch_rows = range(start, min(start + size, len(prompts)))
    # The rows before it, nearest first, cyclically within the forward pass; then those of all the data.
    batch_candidates = [start + (row - start - step) % len(batch_rows) for step in range(1, len(batch_rows))]
    other_candidates = [(row - step) % len(prompts) for step in range(1, len(prompts))]
    candidates = [*batch_candidates, *other_candidates]
    return next(
        (candidate for candidate in candidates if prompts[candidate] != prompts[row]),
        candidates[0] if candidates else row,
    )
