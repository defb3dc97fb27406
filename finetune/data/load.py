"""Load a recipe's ``data`` section: read, parse by layout, filter, mix, split train / held-out.

The same for conversations, preferences and prompts; what differs is a ``RowKind``. Sources are read as
streams, and rows are stored outside of Python's memory.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import isfinite
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_templates.segments import Message
from finetune.data.columns import UnusedColumns
from finetune.data.fields import RowError
from finetune.data.files import Source
from finetune.data.layouts import CONVERSATION_LAYOUTS, DOCUMENT, Layout
from finetune.data.mixture import MixtureComponent, mix_components, sample_row_ids
from finetune.data.readers import SourceRow
from finetune.data.report import DataReport
from finetune.data.row_store import Rows, RowT
from finetune.data.rows import RowParser, first_problems, row_problem
from finetune.data.sources import iter_source
from finetune.recipe.errors import HeldOutError, Problem, UserError
from finetune.recipe.limits import scaled_held_out
from finetune.recipe.settings import DataSettings, MixedSource, SelectSettings, TextFormat

CAP_STREAM, SELECT_STREAM = 0, 1
"""Seed suffixes: one random stream per use, so that changing one leaves the others as they are."""


Parsed = TypeVar("Parsed")
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Specification of one source: where its rows are and which are used; ``key`` is the recipe key.

    With ``first_rows``, no more rows than these are read: to check them, and not to train on them.
    """

    key: str
    source: Source
    split: str
    revision: str | None
    columns: dict[str, str] | None
    max_rows: int | None = None
    select: SelectSettings | None = None
    layouts: tuple[Layout[list[Message]], ...] = CONVERSATION_LAYOUTS
    text_format: TextFormat | None = None
    ignore_columns: tuple[str, ...] = ()
    first_rows: int | None = None

    @property
    def name(self) -> str:
        """Return the source's name for messages."""
        return self.source if isinstance(self.source, str) else self.key


class RowKind(Protocol[RowT]):
    """Conversations, preferences or prompts: how rows become usable, and which are held out."""

    def load(self, spec: SourceSpec, index: int, seed: int, report: DataReport) -> MixtureComponent[RowT]:
        """Return the usable rows of source number ``index``; ``report`` counts the others.

        Raises:
            UserError: the source cannot be read, its rows fit no layout, or none is usable.
        """

    def split(self, rows: Rows[RowT], held_out: int | float, seed: int) -> tuple[Ids, Ids]:
        """Return the indices of the training rows and of the held-out rows of a single source."""

    def groups(self, rows: Rows[RowT]) -> Ids | None:
        """Return the group of each row, rows of one group being held out together; None without groups."""

    def count_relations(
        self,
        rows: Rows[RowT],
        splits: tuple[Rows[RowT], Rows[RowT]],
        reports: tuple[DataReport, DataReport],
    ) -> None:
        """Count what this kind has besides duplicates and leaked rows."""


def load_rows(
    kind: RowKind[RowT], settings: DataSettings, seed: int, report: DataReport, held_out_report: DataReport
) -> tuple[Rows[RowT], Rows[RowT]]:
    """Return the training rows and the held-out rows.

    Args:
        kind: conversations, preferences or prompts.
        settings: the recipe's data section.
        seed: seed of mixture sampling and of the held-out split.
        report: receives counts of dropped rows and what each source contributes.
        held_out_report: receives counts of rows dropped from a held-out file.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or no usable row remains.
    """
    components = [kind.load(spec, index, seed, report) for index, spec in enumerate(source_specs(settings))]
    report.sources = [component.report for component in components]
    report.layout = " + ".join(dict.fromkeys(source.layout for source in report.sources))
    rows = Rows.concatenate([component.rows for component in components])
    if settings.mix is not None:
        holds_out = bool(settings.held_out) and not isinstance(settings.held_out, Source)
        groups = kind.groups(rows) if holds_out else None
        train_ids, held_out_ids = mix_components(components, settings, groups, seed=seed, report=report)
        train, held_out = rows.take(train_ids), rows.take(held_out_ids)
    elif isinstance(settings.held_out, Source):
        train, held_out = rows, rows[:0]
    else:
        count, change = scaled_held_out(len(rows), settings.held_out)
        if change is not None:
            report.notes.append(change.line())
        train_ids, held_out_ids = kind.split(rows, count, seed)
        train, held_out = rows.take(train_ids), rows.take(held_out_ids)
    if (spec := held_out_spec(settings)) is not None:
        held_out = kind.load(spec, 0, seed, held_out_report).rows
    count_duplicates(rows, report)
    count_leaked(held_out, train, held_out_report)
    kind.count_relations(rows, (train, held_out), (report, held_out_report))
    return train, held_out


def source_specs(settings: DataSettings) -> list[SourceSpec]:
    """Return the specs of a data section's source, or of each source of its mixture."""
    if settings.mix is None:
        assert settings.source is not None
        shared = settings.split, settings.revision, settings.columns
        specs = [SourceSpec("data.source", settings.source, *shared, select=settings.select)]
    else:
        specs = [_mixture_spec(index, entry, settings.split) for index, entry in enumerate(settings.mix)]
    return [_with_shared_settings(spec, settings) for spec in specs]


def held_out_spec(settings: DataSettings) -> SourceSpec | None:
    """Return the spec of a data section's held-out rows if they are a source of their own."""
    if not isinstance(settings.held_out, Source):
        return None
    spec = SourceSpec("data.held_out", settings.held_out, settings.split, None, settings.columns)
    return _with_shared_settings(spec, settings)


def _with_shared_settings(spec: SourceSpec, settings: DataSettings) -> SourceSpec:
    """Return the spec with what all sources share; with a text format, plain text is tried first."""
    layouts = spec.layouts if settings.text_format is None else (DOCUMENT, *CONVERSATION_LAYOUTS)
    ignored = tuple(settings.ignore_columns)
    return replace(spec, layouts=layouts, text_format=settings.text_format, ignore_columns=ignored)


def _mixture_spec(index: int, entry: MixedSource, split: str) -> SourceSpec:
    shared = entry.split or split, entry.revision, entry.columns
    # Plain text among conversations is intended where it has a fixed share; elsewhere it is a mistake.
    layouts = CONVERSATION_LAYOUTS if entry.share is None else (*CONVERSATION_LAYOUTS, DOCUMENT)
    return SourceSpec(f"data.mix[{index}]", entry.source, *shared, entry.rows, entry.select, layouts)


Rated = tuple[Parsed, SourceRow, float]
"""A parsed row, the row of the source, and its rating (0 without ``select.score``)."""


def open_source(
    spec: SourceSpec,
    index: int,
    seed: int,
    match: Callable[[list[str]], Layout[Parsed]],
    report: DataReport,
    *,
    unused: Collection[str] = (),
) -> tuple[Layout[Parsed], Iterator[Rated[Parsed]]]:
    """Open source number ``index`` and return its layout and its parsed rows, as a stream.

    Args:
        spec: the source; at most ``spec.max_rows`` rows of it are used, sampled with the seed.
        index: number of the source.
        seed: of the sample.
        match: returns the layout for the column names of the first row. Rows that do not fit it are reported
            with their location.
        report: receives what was detected in files, such as a separator, and the columns that are not used.
        unused: columns that the layout reads, and this stage does not use.

    Raises:
        UserError: the source cannot be read, has no rows, or fits no layout. From the stream: rows do not fit
            the layout (the first few are listed with file, line and field), or a column that changes what
            they mean is not read.
    """
    rng = np.random.default_rng([seed, index, CAP_STREAM])
    max_rows = spec.max_rows

    # A callback, because the number of rows is known only once the source is open.
    def sample_rows(count: int) -> Sequence[int]:
        return sample_row_ids(count, min(max_rows or count, count), rng)

    rows = iter_source(
        spec.source,
        split=spec.split,
        revision=spec.revision,
        row_selector=None if max_rows is None else sample_rows,
        text_format=spec.text_format,
        key=spec.key,
        note=report.notes.append,
    )
    rows = islice(rows, spec.first_rows)
    first = next(rows)
    layout = match([name for name in first.columns if name not in spec.ignore_columns])
    column = spec.select.score if spec.select else None
    if column is not None and column not in first.columns:
        names = ", ".join(first.columns)
        where = f"{spec.key}.select.score"
        raise UserError(Problem(where, f"the source has no column '{column}'", f"one of {names}"))
    # The source is named only where there are several.
    source = spec.name if spec.key.startswith("data.mix") else ""
    columns = UnusedColumns(layout, used=[column] if column else [], unused=unused, source=source)
    parser = RowParser(layout, spec.columns, ignored=spec.ignore_columns, unused=columns)
    return layout, _parse_stream(chain([first], rows), parser, column, report)


def _parse_stream(
    rows: Iterator[SourceRow], parser: RowParser[Parsed], score: str | None, report: DataReport
) -> Iterator[Rated[Parsed]]:
    """Yield rows until one does not fit; then read on, to report how many do not."""
    problems: list[Problem] = []
    count = 0
    for row in rows:
        count += 1
        try:
            parsed = parser.parse(row)
            rating = 0.0 if score is None else _rating(row.columns.get(score), score)
        except RowError as error:
            # Collected and not raised at once: the user sees several of the rows to repair.
            problems.append(row_problem(error, row.location))
            continue
        if not problems:
            yield parsed, row, rating
    if problems:
        raise UserError(first_problems(problems, count))
    report.notes += parser.finish()


def _rating(value: Any, column: str) -> float:
    """Return a rating; a number written as text is parsed.

    Raises:
        RowError: it is not a finite number.
    """
    try:
        rating = float(value) if isinstance(value, (int, float, str)) else float("nan")
    except ValueError:
        rating = float("nan")
    # bool is an int in Python; true/false is a label, not a rating.
    if isinstance(value, bool) or not isfinite(rating):
        raise RowError(column, f"found {value!r}", "a number")
    return rating


def split_rows(num_rows: int, held_out: int | float, seed: int) -> tuple[Ids, Ids]:
    """Return the indices of the training rows and of the held-out rows, which are drawn at random.

    Raises:
        UserError: no training row would remain.
    """
    # The number of rows is part of the seed: another data set gets another split.
    order = np.random.default_rng([seed, num_rows]).permutation(num_rows)
    is_held_out = np.zeros(num_rows, dtype=bool)
    is_held_out[order[: num_held_out(num_rows, held_out)]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def num_held_out(num_rows: int, held_out: int | float) -> int:
    """Return the number of held-out rows of a source: a count, or a fraction of its usable rows.

    Raises:
        UserError: no training row would remain.
    """
    # A fraction holds out at least one row.
    count = held_out if isinstance(held_out, int) else max(1, round(held_out * num_rows)) if held_out else 0
    if count and count >= num_rows:
        actual = f"{count} of {num_rows} usable rows"
        expected = "fewer rows, so that some remain for training"
        repair = "data.held_out=0.1 holds out a tenth of the rows, data.held_out=0 none"
        raise HeldOutError(Problem("data.held_out", actual, expected, repair), num_rows)
    return count


def count_duplicates(rows: Rows[Any], report: DataReport) -> None:
    """Count exact duplicates of an earlier row; they are reported, not dropped."""
    digests, first, index_of = np.unique(rows.text_digests, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[index_of] != np.arange(len(rows)))
    if len(repeats):
        repeated, original = rows[int(repeats[0])], rows[int(first[index_of[repeats[0]]])]
        label = "identical to an earlier row (not dropped)"
        report.count(label, f"{repeated.location} repeats {original.location}", rows=len(repeats))


def count_leaked(held_out: Rows[Any], train: Rows[Any], held_out_report: DataReport) -> None:
    """Count held-out rows that are also training rows (leakage)."""
    leaked = np.flatnonzero(np.isin(held_out.text_digests, train.text_digests))
    if len(leaked):
        row = held_out[int(leaked[0])]
        [*_, last] = np.flatnonzero(train.text_digests == held_out.text_digests[leaked[0]])
        example = f"{row.location} repeats {train[int(last)].location}"
        held_out_report.count("identical to a training row", example, rows=len(leaked))
