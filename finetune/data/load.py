"""Load a recipe's ``data`` section as conversations: read, select, mix, split train / held-out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Protocol

import numpy as np

from data_templates.segments import Message
from finetune.data.conversation import Conversation, filter_usable
from finetune.data.layouts import (
    CONVERSATION_LAYOUTS,
    DOCUMENT,
    Layout,
    detect_layout,
    first_problems,
    parse_conversations,
)
from finetune.data.mixture import MixtureComponent, mix_components, sample_row_ids
from finetune.data.report import DataReport, SourceReport
from finetune.data.selection import select_rows
from finetune.data.sources import SourceRow, read_source
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings, MixedSource, SelectSettings, TextFormat

CAP_STREAM, SELECT_STREAM = 0, 1
"""Seed suffixes: one random stream per use, so that changing one leaves the others as they are."""


class LocatedText(Protocol):
    """A row with a text key (equal keys mean duplicates) and a location (``file:line``)."""

    @property
    def text_key(self) -> object:
        """Return roles and texts: two rows with equal ones are duplicates."""

    @property
    def location(self) -> str:
        """Return the row's location (``file:line``)."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Specification of one source: where its rows are and which are used; ``key`` is the recipe key."""

    key: str
    source: str | list[dict[str, Any]]
    split: str
    revision: str | None
    columns: dict[str, str] | None
    max_rows: int | None = None
    select: SelectSettings | None = None
    layouts: tuple[Layout[list[Message]], ...] = CONVERSATION_LAYOUTS
    text_format: TextFormat | None = None

    @property
    def name(self) -> str:
        """Return the source's name for messages."""
        return self.source if isinstance(self.source, str) else self.key


def load_conversations(
    settings: DataSettings, seed: int, report: DataReport, held_out_report: DataReport
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the training rows and the held-out rows.

    Args:
        settings: the recipe's data section.
        seed: seed of mixture sampling and of the held-out split.
        report: receives counts of dropped rows and what each source contributes.
        held_out_report: receives counts of rows dropped from a held-out file.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or no trainable row remains.
    """
    components = [
        _load_component(spec, index, seed, report) for index, spec in enumerate(source_specs(settings))
    ]
    report.sources = [component.report for component in components]
    report.layout = " + ".join(dict.fromkeys(source.layout for source in report.sources))
    if settings.mix is None:
        train, held_out = _split_held_out(components[0].rows, settings.held_out, seed)
    else:
        train, held_out = mix_components(components, settings, seed=seed, report=report)
    if isinstance(settings.held_out, str):
        spec = SourceSpec("data.held_out", settings.held_out, settings.split, None, settings.columns)
        spec = _with_text_format(spec, settings.text_format)
        held_out = load_source(spec, held_out_report, seed=seed)
    count_duplicates([row for component in components for row in component.rows], report)
    count_leaked(held_out, train, held_out_report)
    return train, held_out


def load_source(spec: SourceSpec, report: DataReport, *, seed: int) -> list[Conversation]:
    """Return the usable conversations of one source outside the training data, such as a held-out file.

    Raises:
        UserError: it cannot be read, or its rows fit no layout.
    """
    return filter_usable(_parse_source(spec, 0, seed)[0], report)


def source_specs(settings: DataSettings) -> list[SourceSpec]:
    """Return the specs of a data section's source, or of each source of its mixture."""
    if settings.mix is None:
        assert settings.source is not None
        shared = settings.split, settings.revision, settings.columns
        specs = [SourceSpec("data.source", settings.source, *shared, select=settings.select)]
    else:
        specs = [_mixture_spec(index, entry, settings.split) for index, entry in enumerate(settings.mix)]
    return [_with_text_format(spec, settings.text_format) for spec in specs]


def _with_text_format(spec: SourceSpec, text_format: TextFormat | None) -> SourceSpec:
    """Return the spec with the plain-text layout tried first; unchanged if ``text_format`` is None."""
    return (
        spec
        if text_format is None
        else replace(spec, layouts=(DOCUMENT, *CONVERSATION_LAYOUTS), text_format=text_format)
    )


def _mixture_spec(index: int, entry: MixedSource, split: str) -> SourceSpec:
    shared = entry.split or split, entry.revision, entry.columns
    # Plain text among conversations is intended where it has a fixed share; elsewhere it is a mistake.
    layouts = CONVERSATION_LAYOUTS if entry.share is None else (*CONVERSATION_LAYOUTS, DOCUMENT)
    return SourceSpec(f"data.mix[{index}]", entry.source, *shared, entry.rows, entry.select, layouts)


def _load_component(
    spec: SourceSpec, index: int, seed: int, report: DataReport
) -> MixtureComponent[Conversation]:
    conversations, layout = _parse_source(spec, index, seed)
    rows = filter_usable(conversations, report)
    # Per source, before mixing: rates by size refer to the selected rows.
    if spec.select is not None:
        rng = np.random.default_rng([seed, index, SELECT_STREAM])
        rows = select_rows(rows, spec.select, rng=rng, report=report)
    if not rows:
        actual = f"no row to train on: {'; '.join(report.lines()[1:])}"
        mapping_repair = "map other columns: 'data.columns={instruction: Q, output: A}'"
        repair = (
            f"check the rows named above, or {'loosen the select filters' if spec.select else mapping_repair}"
        )
        raise UserError(Problem(spec.key, actual, "rows with an assistant reply", repair))
    return MixtureComponent(
        SourceReport(spec.name, layout, num_read=len(conversations), num_usable=len(rows)), rows
    )


def _parse_source(spec: SourceSpec, index: int, seed: int) -> tuple[list[Conversation], str]:
    """Return a source's rows as conversations, and the name of the detected layout."""
    rows = read_rows_of(spec, index, seed)
    # By the first row; rows that do not fit its layout are reported with their location.
    layout = detect_layout(rows[0].columns, columns=spec.columns, where=spec.name, layouts=spec.layouts)
    conversations = parse_conversations(rows, layout, spec.columns)
    column = spec.select.score if spec.select else None
    scores = (
        [0.0] * len(rows) if column is None else read_ratings(rows, column, where=f"{spec.key}.select.score")
    )
    rated_rows = zip(conversations, rows, scores, strict=True)
    return [
        Conversation(messages, row.location, index, score) for messages, row, score in rated_rows
    ], layout.name


def read_rows_of(spec: SourceSpec, index: int, seed: int) -> list[SourceRow]:
    """Return the rows of source number ``index``, at most ``spec.max_rows`` of them, sampled with the seed.

    Raises:
        UserError: the source cannot be read, or has no rows.
    """
    rng = np.random.default_rng([seed, index, CAP_STREAM])
    max_rows = spec.max_rows

    # A callback, because the number of rows is known only once the source is open.
    def sample_rows(count: int) -> Sequence[int]:
        return range(count) if max_rows is None else sample_row_ids(count, min(max_rows, count), rng)

    return read_source(
        spec.source,
        split=spec.split,
        revision=spec.revision,
        row_selector=sample_rows,
        text_format=spec.text_format,
    )


def read_ratings(rows: list[SourceRow], column: str, *, where: str) -> list[float]:
    """Return each row's rating; numbers written as text are parsed.

    Raises:
        UserError: there is no such column, or it is not a finite number in some rows.
    """
    if column not in rows[0].columns:
        names = ", ".join(rows[0].columns)
        raise UserError(Problem(where, f"the source has no column '{column}'", f"one of {names}"))
    scores, problems = [], []
    for row in rows:
        value = row.columns.get(column)
        try:
            score = float(value) if isinstance(value, (int, float, str)) else float("nan")
        except ValueError:
            score = float("nan")
        # bool is an int in Python; true/false is a label, not a rating.
        if isinstance(value, bool) or not isfinite(score):
            problems.append(Problem(row.location, f"field '{column}': found {value!r}", "a number"))
        scores.append(score)
    if problems:
        raise UserError(first_problems(problems, len(rows)))
    return scores


def _split_held_out(
    rows: list[Conversation], held_out: int | float | str, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the training rows and the held-out rows of a single source."""
    if isinstance(held_out, str):
        return rows, []
    count = num_held_out(len(rows), held_out)
    # The number of rows is part of the seed: another data set gets another split.
    held_out_ids = set(np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count].tolist())
    train = [row for index, row in enumerate(rows) if index not in held_out_ids]
    return train, [row for index, row in enumerate(rows) if index in held_out_ids]


def num_held_out(num_rows: int, held_out: int | float) -> int:
    """Return the number of held-out rows of a source: a count, or a fraction of its usable rows.

    Raises:
        UserError: no training row would remain.
    """
    # A fraction holds out at least one row.
    count = held_out if isinstance(held_out, int) else max(1, round(held_out * num_rows)) if held_out else 0
    if count and count >= num_rows:
        actual = f"{count} of {num_rows} usable rows"
        raise UserError(Problem("data.held_out", actual, "fewer rows, so that some remain for training"))
    return count


def count_duplicates(rows: Sequence[LocatedText], report: DataReport) -> None:
    """Count exact duplicates of an earlier row; they are reported, not dropped."""
    first_location: dict[object, str] = {}
    for row in rows:
        if row.text_key in first_location:
            report.count(
                "identical to an earlier row (not dropped)",
                f"{row.location} repeats {first_location[row.text_key]}",
            )
        else:
            first_location[row.text_key] = row.location


def count_leaked(
    held_out: Sequence[LocatedText], train: Sequence[LocatedText], held_out_report: DataReport
) -> None:
    """Count held-out rows that are also training rows (leakage)."""
    if held_out:
        train_location = {row.text_key: row.location for row in train}
        for row in held_out:
            if row.text_key in train_location:
                held_out_report.count(
                    "identical to a training row", f"{row.location} repeats {train_location[row.text_key]}"
                )
