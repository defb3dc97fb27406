"""Masked mean, variance and whitening.

Masked-out entries are never read: they may be NaN, and their gradient is exactly 0.
"""

import torch
from torch import Tensor

VARIANCE_EPSILON = 1e-8
"""Added to the variance in whitening, as in the published code (arXiv 2403.17031, detail 24)."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the mask, NaN if it is empty.

    Args:
        values: (C, T), or any shape.
        mask: bool of the same shape.

    Returns:
        A scalar.

    >>> masked_mean(torch.tensor([[1.0, 3.0], [8.0, 100.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(4.)
    """
    return values.masked_fill(~mask, 0.0).sum() / mask.sum()


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = True) -> Tensor:
    """Return the variance over the mask: the sum of squares over n - 1, or over n.

    A single entry has variance 0 with either divisor; an empty mask gives NaN.

    Args:
        values: (C, T), or any shape.
        mask: bool of the same shape.
        unbiased: divide by n - 1 (Bessel).

    Returns:
        A scalar. Of 1, 3, 8: mean 4, squares 9 + 1 + 16 = 26, so 26 / 2.

    >>> values, mask = torch.tensor([[1.0, 3.0], [8.0, 100.0]]), torch.tensor([[True, True], [True, False]])
    >>> masked_var(values, mask)
    tensor(13.)
    >>> masked_var(values, mask, unbiased=False)
    tensor(8.6667)
    """
    count = mask.sum()
    squared_errors = (values - masked_mean(values, mask)).masked_fill(~mask, 0.0) ** 2
    return squared_errors.sum() / (torch.where(count > 1, count - 1, count) if unbiased else count)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool) -> Tensor:
    """Return (x - mean) / sqrt(var + 1e-8), plus the mean if ``shift_mean`` is false.

    Rewards are whitened with their mean retained, advantages with mean 0 (arXiv 2403.17031, details 24
    and 25; "The N implementation details of RLHF with PPO", reward and advantage whitening). The variance is
    over n - 1, as in TRL's PPO. The code of that paper divides by n, so that its values are larger by the
    factor sqrt(n / (n - 1)); and it whitens the tokens of each process separately.

    Args:
        values: (C, T), or any shape.
        mask: bool of the same shape.
        shift_mean: whether the mean becomes 0; otherwise it is retained.

    Returns:
        The shape of ``values``; exactly 0 outside the mask. Of 2, 4, 6 (mean 4, variance 4):

    >>> values, mask = torch.tensor([[2.0, 4.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    >>> whiten(values, mask, shift_mean=True)
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    >>> whiten(values, mask, shift_mean=False)
    tensor([[3., 4.],
            [5., 0.]])
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + VARIANCE_EPSILON)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)
