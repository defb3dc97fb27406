"""How much a small sample says: intervals of proportions, and changes that are too few to tell."""

from math import sqrt

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
FEW_CASES = 20
"""Held-out cases below which a mean without a known spread says nothing: its standard error is a quarter of a
standard deviation."""


def wilson_interval(proportion: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion over ``count`` independent cases.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference". Unlike the normal
    approximation it stays within [0, 1] and has a nonzero width at proportions of 0 and 1. For a mean of
    values between 0 and 1 it is wider than needed.

    >>> [round(end, 3) for end in wilson_interval(0.9, 100)]
    [0.826, 0.945]
    """
    center = (proportion + Z_95**2 / (2 * count)) / (1 + Z_95**2 / count)
    half_width = (
        Z_95 / (1 + Z_95**2 / count) * sqrt(proportion * (1 - proportion) / count + Z_95**2 / (4 * count**2))
    )
    return max(0.0, center - half_width), min(1.0, center + half_width)


def change_interval(before: float, after: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of the change of a proportion between two samples of ``count`` cases.

    Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10. The
    same cases before and after are not independent: the interval is then wider than needed.

    >>> [round(end, 2) for end in change_interval(0.5, 0.75, 4)]
    [-0.32, 0.66]
    """
    (low_before, high_before), (low_after, high_after) = (
        wilson_interval(before, count),
        wilson_interval(after, count),
    )
    change = after - before
    return (
        change - sqrt((after - low_after) ** 2 + (high_before - before) ** 2),
        change + sqrt((high_after - after) ** 2 + (before - low_before) ** 2),
    )


def is_conclusive(before: float, after: float, count: int) -> bool:
    """Return whether a proportion has changed by more than chance explains."""
    low, high = change_interval(before, after, count)
    return low > 0 or high < 0


def describe_sample(before: float, after: float, count: int) -> str:
    """Return the size of a sample with the interval of its proportion after training, for one line.

    >>> describe_sample(0.5, 0.75, 4)
    '4 cases: 95 % interval 30 % to 95 %, too few to tell'
    """
    low, high = (100 * end for end in wilson_interval(after, count))
    doubt = ", too few to tell" if before != after and not is_conclusive(before, after, count) else ""
    return f"{count:,} case{'s' if count > 1 else ''}: 95 % interval {low:.0f} % to {high:.0f} %{doubt}"
