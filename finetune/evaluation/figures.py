"""Figures with their intervals as text."""

from finetune.evaluation.results import Estimate


def format_value(value: float, *, percent: bool) -> str:
    """Return a figure as text.

    >>> format_value(0.8254, percent=True), format_value(1.23456, percent=False)
    ('82.5 %', '1.235')
    """
    return f"{100 * value:.1f} %" if percent else f"{value:.3f}"


def format_estimate(estimate: Estimate) -> str:
    """Return a figure with its interval.

    >>> format_estimate(Estimate(0.95, 0.888, 0.978, 100, 100))
    '95.0 % (88.8 to 97.8)'
    """
    low, high = (
        format_value(end, percent=estimate.percent).removesuffix(" %")
        for end in (estimate.low, estimate.high)
    )
    return f"{format_value(estimate.value, percent=estimate.percent)} ({low} to {high})"
