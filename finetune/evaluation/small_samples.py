"""How much a small sample says: intervals of proportions and of changes, and what is too few to tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, pstdev, stdev

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
FEW_CASES = 20
"""Held-out cases below which a mean without a known spread says nothing: its standard error is a quarter of a
standard deviation."""

MEDIUM_EFFECT = 0.5
"""A change of half a standard deviation: Cohen 1988, "Statistical power analysis", section 2.2."""


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


@dataclass(frozen=True)
class MeanChange:
    """Change of a mean over the same cases, with its 95 % interval: the change plus or minus ``half_width``.

    Attributes:
        before: mean before.
        after: mean after.
        count: number of cases.
        std: standard deviation of the cases before.
        half_width: 1.96 standard errors of the mean difference of a case; 0 for a single case.
    """

    before: float
    after: float
    count: int
    std: float
    half_width: float

    @property
    def gain(self) -> float:
        """Return after minus before."""
        return self.after - self.before

    @property
    def is_conclusive(self) -> bool:
        """Return whether the mean has changed by more than chance explains, on enough cases."""
        return self.count >= FEW_CASES and abs(self.gain) > self.half_width

    @property
    def is_precise(self) -> bool:
        """Return whether there are enough cases to show a change of MEDIUM_EFFECT."""
        return self.count >= FEW_CASES and self.half_width <= MEDIUM_EFFECT * self.std

    def describe(self) -> str:
        """Return the change with its interval, and in standard deviations, for one line.

        >>> MeanChange(1.0, 1.5, 64, std=2.0, half_width=0.25).describe()
        '1.000 → 1.500 (+0.500 ± 0.250 on 64 prompts; +0.25 standard deviations)'
        """
        scale = f"; {self.gain / self.std:+.2f} standard deviations" if self.std else ""
        prompts = f"{self.count} prompt{'s' if self.count != 1 else ''}"
        interval = f"{self.gain:+.3f} ± {self.half_width:.3f}" if self.count > 1 else f"{self.gain:+.3f}"
        return f"{self.before:.3f} → {self.after:.3f} ({interval} on {prompts}{scale})"


def paired_change(before: Sequence[float], after: Sequence[float]) -> MeanChange:
    """Return the change of the mean between two measurements of the same cases.

    >>> change = paired_change([0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 3.0, 3.0])
    >>> change.before, change.after, round(change.half_width, 4)
    (1.5, 2.0, 0.5658)
    """
    differences = [second - first for first, second in zip(before, after, strict=True)]
    error = stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else 0.0
    return MeanChange(fmean(before), fmean(after), len(before), pstdev(before), Z_95 * error)


def describe_sample(before: float, after: float, count: int) -> str:
    """Return the size of a sample with the interval of its proportion after training, for one line.

    >>> describe_sample(0.5, 0.75, 4)
    '4 cases: 95 % interval 30 % to 95 %, too few to tell'
    """
    low, high = (100 * end for end in wilson_interval(after, count))
    doubt = ", too few to tell" if before != after and not is_conclusive(before, after, count) else ""
    return f"{count:,} case{'s' if count > 1 else ''}: 95 % interval {low:.0f} % to {high:.0f} %{doubt}"
