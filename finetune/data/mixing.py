"""Mixing rates (examples-proportional, temperature), row quotas and sampling: pure functions over sizes."""

from collections.abc import Sequence
from math import floor, fsum

import numpy as np

ROUNDING = 1e-9
"""Tolerance for float rates: 0.3 * 10 may be slightly below 3 and is still three rows."""


def size_proportional_rates(
    sizes: Sequence[int], *, limit: int | None = None, temperature: float = 1.0
) -> list[float]:
    """Return each source's mixing rate: rate_i = min(n_i, K)^(1/T) / sum_j min(n_j, K)^(1/T).

    Examples-proportional mixing with a maximum K (Raffel et al. 2019, arXiv 1910.10683, section 3.5.2; FLAN,
    arXiv 2109.01652, section 2.1, with K = 3,000; T0, arXiv 2110.08207, section 5) at temperature T.

    >>> size_proportional_rates([100, 300, 9000], limit=600)
    [0.1, 0.3, 0.6]
    """
    amounts = [min(size, limit or size) ** (1 / temperature) for size in sizes]
    return [amount / fsum(amounts) for amount in amounts]


def apply_fixed_shares(rates: Sequence[float], shares: Sequence[float | None]) -> list[float]:
    """Return rates in which some sources have a fixed share; the others divide the rest by their rates.

    ``rates`` need not add up to 1, so weights can be passed directly.

    >>> apply_fixed_shares([1, 3, 1], [None, None, 0.5])
    [0.125, 0.375, 0.5]
    """
    free = fsum(rate for rate, share in zip(rates, shares, strict=True) if share is None)
    # fsum: exactly rounded, so the order of the sources does not change the rates.
    left = 1 - fsum(share for share in shares if share is not None)
    return [left * rate / free if share is None else share for rate, share in zip(rates, shares, strict=True)]


def max_rows_without_repeats(sizes: Sequence[int], rates: Sequence[float]) -> int:
    """Return the number of rows of the longest mixture at these rates in which no row repeats.

    >>> max_rows_without_repeats([100, 9000], [0.25, 0.75])
    400
    """
    return min(floor(size / rate + ROUNDING) for size, rate in zip(sizes, rates, strict=True))


def allocate_rows(total: int, rates: Sequence[float]) -> list[int]:
    """Return the number of rows per source: within one row of its rate, ``total`` in sum.

    Largest remainders are rounded up first (Hamilton's method); ties go to the earlier source.

    >>> allocate_rows(10, [0.55, 0.25, 0.2])
    [6, 2, 2]
    """
    exact = [total * rate for rate in rates]
    counts = [floor(value + ROUNDING) for value in exact]
    order = sorted(range(len(rates)), key=lambda index: (counts[index] - exact[index], index))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts


def sample_row_ids(size: int, count: int, rng: np.random.Generator) -> list[int]:
    """Return ``count`` row indices below ``size``, without replacement; an exhausted source is repeated.

    In source order; a row that is used k times is listed k times.
    """
    repeats, rest = divmod(count, size)
    remainder = rng.permutation(size)[:rest].tolist()
    return sorted([*range(size)] * repeats + remainder)
