"""Data mixture: sampling rates per source, held-out rows of each, and the rows of one epoch.

Rates are proportional to numbers of rows (capped, smoothed by a temperature), or given as weights and shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import floor, fsum
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from finetune.data.report import DataReport, SourceReport
from finetune.data.row_store import Rows, RowT
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.limits import scaled_held_out
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.settings import DataSettings

ROUNDING = 1e-9
"""Tolerance for float rates: 0.3 * 10 may be slightly below 3 and is still three rows."""

HELD_OUT_STREAM, SAMPLE_STREAM, SHUFFLE_STREAM = 2, 3, 4
"""Seed suffixes of a source's random streams, next to those of reading (0 and 1)."""


@dataclass(frozen=True, slots=True)
class MixtureComponent(Generic[RowT]):
    """One source of a mixture: its usable rows and its report."""

    report: SourceReport
    rows: Rows[RowT]


def mix_components(
    components: Sequence[MixtureComponent[Any]],
    settings: DataSettings,
    groups: NDArray[np.int64] | None = None,
    *,
    seed: int,
    report: DataReport,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return one epoch's shuffled training rows and the held-out rows, in the same proportions.

    Both are indices into the components' rows, one component after the other. A source's rows are sampled
    without replacement; an exhausted source is repeated. Every epoch has the same rows, in another order
    (that of the batches): to see more of a large source, set more rows per epoch. A pure function of seed and
    rows.

    Args:
        components: the sources.
        settings: the recipe's data section.
        groups: the group of each row (its prompt): no group is in both splits. None: each row by itself.
        seed: of the samples.
        report: receives notes.

    Raises:
        UserError: more rows of a source are held out than it has.
    """
    sizes = [len(component.rows) for component in components]
    starts = [0, *accumulate(sizes)]
    # Held-out rows are taken first, at the rates of the full sources; the epoch's rates use what remains.
    held_out_counts = _held_out_counts(components, settings, _mixing_rates(sizes, settings), report)
    is_held_out = np.zeros(starts[-1], dtype=bool)
    for index, count in enumerate(held_out_counts):
        rng, rows = np.random.default_rng([seed, index, HELD_OUT_STREAM]), slice(*starts[index : index + 2])
        # Rows without a prompt are groups of their own.
        own_groups = np.arange(sizes[index]) if groups is None else groups[rows]
        is_held_out[rows] = draw_groups(own_groups, count, rng)
    if groups is not None:
        # A prompt of several sources would be in both splits.
        shared = np.isin(groups, groups[is_held_out]) & ~is_held_out
        if num_shared := int(shared.sum()):
            report.notes.append(f"{num_shared} more rows are held out: other rows of their prompts are")
        is_held_out |= shared
    train_ids = [np.flatnonzero(~is_held_out[start:end]) + start for start, end in pairwise(starts)]
    _require_training_rows(components, [len(ids) for ids in train_ids])
    remaining = [len(ids) for ids in train_ids]
    counts = _epoch_counts(components, remaining, _mixing_rates(remaining, settings), settings, report)
    sampled: list[NDArray[np.int64]] = []
    for index, (ids, count) in enumerate(zip(train_ids, counts, strict=True)):
        rng = np.random.default_rng([seed, index, SAMPLE_STREAM])
        sampled.append(ids[sample_row_ids(len(ids), count, rng)])
    # Until here the rows are grouped by source.
    epoch_ids = np.concatenate(sampled)
    order = np.random.default_rng([seed, len(components), SHUFFLE_STREAM]).permutation(len(epoch_ids))
    return epoch_ids[order], np.flatnonzero(is_held_out)


def draw_groups(groups: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a mask of rows to hold out: complete groups, at most ``count`` rows.

    >>> draw_groups(np.array([0, 0, 1, 2]), 2, np.random.default_rng(0)).tolist()
    [False, False, True, True]
    """
    _, first, group_of_row, sizes = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    # In the order in which groups occur, so that their numbers do not matter.
    by_first = np.argsort(first, kind="stable")
    chosen, num_rows = np.zeros(len(sizes), dtype=bool), 0
    # Greedy: a group with more rows than are still wanted is skipped.
    for index in by_first[rng.permutation(len(by_first))]:
        if num_rows + sizes[index] <= count:
            chosen[index] = True
            num_rows += int(sizes[index])
    return chosen[group_of_row]


def _require_training_rows(components: Sequence[MixtureComponent[Any]], remaining: Sequence[int]) -> None:
    problems = [
        Problem(
            "data.held_out",
            f"all rows of {component.report.source}: their prompts are held out",
            "rows that remain for training",
            "hold out fewer rows, or a file of its own",
        )
        for component, count in zip(components, remaining, strict=True)
        if not count
    ]
    if problems:
        raise UserError(problems)


def _mixing_rates(sizes: Sequence[int], settings: DataSettings) -> list[float]:
    """Return each source's fraction of the mixture: fixed shares, the rest divided by weight or by size."""
    assert settings.mix is not None
    shares = [entry.share for entry in settings.mix]
    free = [size for size, share in zip(sizes, shares, strict=True) if share is None]
    by_size = iter(
        size_proportional_rates(free, limit=settings.mix_size_cap, temperature=settings.mix_temperature)
    )
    weights = [
        0.0 if entry.share is not None else next(by_size) if entry.weight is None else entry.weight
        for entry in settings.mix
    ]
    return apply_fixed_shares(weights, shares)


def _held_out_counts(
    components: Sequence[MixtureComponent[Any]],
    settings: DataSettings,
    rates: Sequence[float],
    report: DataReport,
) -> list[int]:
    """Return the number of held-out rows per source; a fraction is of the longest mixture without repeats."""
    num_held_out = settings.held_out
    if isinstance(num_held_out, str | PythonRows) or not num_held_out:
        return [0] * len(components)
    sizes = [len(component.rows) for component in components]
    if isinstance(num_held_out, float):
        # At least one row: a fraction of a small mixture may round to zero.
        num_held_out = max(1, round(num_held_out * max_rows_without_repeats(sizes, rates)))
    num_held_out, change = scaled_held_out(max_rows_without_repeats(sizes, rates), num_held_out)
    if change is not None:
        report.notes.append(change.line())
    counts = allocate_rows(int(num_held_out), rates)
    problems = [
        Problem(
            "data.held_out",
            f"{count} of {size} rows of {component.report.source}",
            "fewer rows than the source has",
            "data.held_out=0.1 holds out a tenth of the mixture",
        )
        for component, count, size in zip(components, counts, sizes, strict=True)
        if count >= size
    ]
    if problems:
        raise UserError(problems)
    return counts


def _epoch_counts(
    components: Sequence[MixtureComponent[Any]],
    sizes: Sequence[int],
    rates: Sequence[float],
    settings: DataSettings,
    report: DataReport,
) -> list[int]:
    """Return the number of rows per source and epoch; repeats and unused rows are noted in the report."""
    max_rows = max_rows_without_repeats(sizes, rates)
    counts = allocate_rows(settings.epoch_rows or max_rows, rates)
    for component, rate in zip(components, rates, strict=True):
        component.report.target_rate = rate
    names = [component.report.source for component in components]
    if settings.epoch_rows is None and max_rows < sum(sizes):
        first = names[int(np.argmin(np.divide(sizes, rates)))]
        report.notes.append(
            f"one epoch is {max_rows} of {sum(sizes)} rows: it ends when {first} is exhausted; "
            "set data.epoch_rows for a longer epoch (smaller sources then repeat)"
        )
    for name, size, count in zip(names, sizes, counts, strict=True):
        if count > size:
            report.notes.append(
                f"rows of {name} repeat {count / size:.1f} times per epoch: {count} samples of {size} rows"
            )
        elif not count:
            report.notes.append(f"no row of {name} is used: its rate is below one row of the mixture")
    return counts


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
