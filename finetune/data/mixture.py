"""Data mixture: sampling rates per source, held-out rows of each, and the rows of one epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from finetune.data import mixing
from finetune.data.report import DataReport, SourceReport
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings

HELD_OUT, DRAWN, SHUFFLED = 2, 3, 4
"""Seed suffixes of a source's random streams, next to those of reading (0 and 1)."""

Row = TypeVar("Row")
"""A conversation, or a prompt with its completions."""


@dataclass(frozen=True, slots=True)
class Part(Generic[Row]):
    """One source of a mixture: its usable rows and its report."""

    report: SourceReport
    rows: list[Row]


def mix(
    parts: Sequence[Part[Row]], settings: DataSettings, *, seed: int, report: DataReport
) -> tuple[list[Row], list[Row]]:
    """Return the shuffled rows of one epoch of the mixture and its held-out rows, in the same proportions.

    A source's rows are sampled without replacement; an exhausted source is reshuffled. Every epoch has the
    same rows, in another order (that of the batches): to see more of a large source, set more rows per epoch.
    A pure function of seed and rows.

    Raises:
        UserError: more rows of a source are held out than it has.
    """
    sizes = [len(part.rows) for part in parts]
    # Held-out rows are taken first, at the rates of the full sources; the epoch's rates use what remains.
    apart = _held_out(parts, settings, _rates(sizes, settings))
    learnt: list[list[Row]] = []
    held_out: list[Row] = []
    for index, (part, count) in enumerate(zip(parts, apart, strict=True)):
        order = np.random.default_rng([seed, index, HELD_OUT]).permutation(len(part.rows))
        chosen = set(order[:count].tolist())
        learnt.append([row for number, row in enumerate(part.rows) if number not in chosen])
        held_out += [row for number, row in enumerate(part.rows) if number in chosen]
    rates = _rates([len(rows) for rows in learnt], settings)
    counts = _counts(parts, learnt, rates, settings, report)
    drawn: list[Row] = []
    for index, (rows, count) in enumerate(zip(learnt, counts, strict=True)):
        random = np.random.default_rng([seed, index, DRAWN])
        drawn += [rows[number] for number in mixing.draw(len(rows), count, random)]
    # Until here the rows are grouped by source.
    order = np.random.default_rng([seed, len(parts), SHUFFLED]).permutation(len(drawn))
    return [drawn[number] for number in order], held_out


def _rates(sizes: Sequence[int], settings: DataSettings) -> list[float]:
    """Return each source's fraction of the mixture: fixed shares, the rest divided by weight or by size."""
    assert settings.mix is not None
    shares = [part.share for part in settings.mix]
    free = [size for size, share in zip(sizes, shares, strict=True) if share is None]
    by_size = iter(mixing.rates_by_size(free, limit=settings.mix_limit, temperature=settings.mix_temperature))
    weights = [
        0.0 if part.share is not None else next(by_size) if part.weight is None else part.weight
        for part in settings.mix
    ]
    return mixing.with_shares(weights, shares)


def _held_out(parts: Sequence[Part[Any]], settings: DataSettings, rates: Sequence[float]) -> list[int]:
    """Return the number of held-out rows per source; a fraction is of the longest mixture without repeats."""
    wanted = settings.held_out
    if isinstance(wanted, str) or not wanted:
        return [0] * len(parts)
    sizes = [len(part.rows) for part in parts]
    if isinstance(wanted, float):
        wanted = max(1, round(wanted * mixing.rows_until_used_up(sizes, rates)))
    counts = mixing.quotas(wanted, rates)
    problems = [
        Problem(
            "data.held_out",
            f"{count} of {size} rows of {part.report.source}",
            "fewer rows than the source has",
        )
        for part, count, size in zip(parts, counts, sizes, strict=True)
        if count >= size
    ]
    if problems:
        raise UserError(problems)
    return counts


def _counts(
    parts: Sequence[Part[Any]],
    learnt: Sequence[Sequence[Any]],
    rates: Sequence[float],
    settings: DataSettings,
    report: DataReport,
) -> list[int]:
    """Return the number of rows per source and epoch; repeats and unused rows are noted in the report."""
    sizes = [len(rows) for rows in learnt]
    most = mixing.rows_until_used_up(sizes, rates)
    counts = mixing.quotas(settings.mix_rows or most, rates)
    for part, rate in zip(parts, rates, strict=True):
        part.report.asked = rate
    names = [part.report.source for part in parts]
    if settings.mix_rows is None and most < sum(sizes):
        first = names[int(np.argmin(np.divide(sizes, rates)))]
        report.notes.append(
            f"one epoch is {most} of {sum(sizes)} rows: it ends when {first} is exhausted; "
            "set data.mix_rows for a longer epoch (smaller sources then repeat)"
        )
    for name, size, count in zip(names, sizes, counts, strict=True):
        if count > size:
            report.notes.append(
                f"rows of {name} repeat {count / size:.1f} times per epoch: {count} samples of {size} rows"
            )
        elif not count:
            report.notes.append(f"no row of {name} is used: its rate is below one row of the mixture")
    return counts
