"""Load a recipe's ``data`` section as conversations: read, select, mix, split train / held-out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Protocol

import numpy as np

from data_templates._segments import Message
from finetune.data import mixing
from finetune.data.conversation import Conversation, usable
from finetune.data.layouts import DOCUMENT, LAYOUTS, Layout, first_of, recognise, to_conversations
from finetune.data.mixture import Part, mix
from finetune.data.report import DataReport, SourceReport
from finetune.data.selection import select
from finetune.data.sources import Row, read_source
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings, MixedSource, SelectSettings, Texts

CAPPED, SELECTED = 0, 1
"""Seed suffixes: one random stream per use, so that changing one leaves the others as they are."""


class Said(Protocol):
    """A row with a text key (equal keys mean duplicates) and a location (``file:line``)."""

    @property
    def words(self) -> object:
        """Return roles and texts: two rows with equal ones are duplicates."""

    @property
    def where(self) -> str:
        """Return the row's location (``file:line``)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Specification of one source: where its rows are and which are used; ``key`` is the recipe key."""

    key: str
    source: str | list[dict[str, Any]]
    split: str
    revision: str | None
    columns: dict[str, str] | None
    rows: int | None = None
    select: SelectSettings | None = None
    layouts: tuple[Layout[list[Message]], ...] = LAYOUTS
    texts: Texts | None = None

    @property
    def name(self) -> str:
        """Return the source's name for messages."""
        return self.source if isinstance(self.source, str) else self.key


def gather(
    settings: DataSettings, seed: int, report: DataReport, aside: DataReport
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
    parts = [_part(place, index, seed, report) for index, place in enumerate(places_of(settings))]
    report.sources = [part.report for part in parts]
    report.layout = " + ".join(dict.fromkeys(source.layout for source in report.sources))
    if settings.mix is None:
        train, held_out = _split(parts[0].rows, settings.held_out, seed)
    else:
        train, held_out = mix(parts, settings, seed=seed, report=report)
    if isinstance(settings.held_out, str):
        place = Place("data.held_out", settings.held_out, settings.split, None, settings.columns)
        place = _as_texts(place, settings.texts)
        held_out = read_conversations(place, aside, seed=seed)
    count_copies([row for part in parts for row in part.rows], report)
    count_seen(held_out, train, aside)
    return train, held_out


def read_conversations(place: Place, report: DataReport, *, seed: int) -> list[Conversation]:
    """Return the usable conversations of one source outside the training data, such as a held-out file.

    Raises:
        UserError: it cannot be read, or its rows fit no layout.
    """
    return usable(_conversations(place, 0, seed)[0], report)


def places_of(settings: DataSettings) -> list[Place]:
    """Return the specs of a data section's source, or of each source of its mixture."""
    if settings.mix is None:
        assert settings.source is not None
        where = settings.split, settings.revision, settings.columns
        places = [Place("data.source", settings.source, *where, select=settings.select)]
    else:
        places = [_place(index, part, settings.split) for index, part in enumerate(settings.mix)]
    return [_as_texts(place, settings.texts) for place in places]


def _as_texts(place: Place, texts: Texts | None) -> Place:
    """Return the spec with the plain-text layout tried first; unchanged if ``text_format`` is None."""
    return place if texts is None else replace(place, layouts=(DOCUMENT, *LAYOUTS), texts=texts)


def _place(index: int, part: MixedSource, split: str) -> Place:
    where = part.split or split, part.revision, part.columns
    # Plain text among conversations is intended where it has a fixed share; elsewhere it is a mistake.
    layouts = LAYOUTS if part.share is None else (*LAYOUTS, DOCUMENT)
    return Place(f"data.mix[{index}]", part.source, *where, part.rows, part.select, layouts)


def _part(place: Place, index: int, seed: int, report: DataReport) -> Part[Conversation]:
    found, layout = _conversations(place, index, seed)
    rows = usable(found, report)
    # Per source, before mixing: rates by size refer to the selected rows.
    if place.select is not None:
        random = np.random.default_rng([seed, index, SELECTED])
        rows = select(rows, place.select, random=random, report=report)
    if not rows:
        told = f"no row to train on: {'; '.join(report.lines()[1:])}"
        other = "map other columns: data.columns={instruction: Q, output: A}"
        repair = f"check the rows named above, or {'loosen the select filters' if place.select else other}"
        raise UserError(Problem(place.key, told, "rows with an assistant reply", repair))
    return Part(SourceReport(place.name, layout, found=len(found), usable=len(rows)), rows)


def _conversations(place: Place, index: int, seed: int) -> tuple[list[Conversation], str]:
    """Return a source's rows as conversations, and the name of the detected layout."""
    rows = read_place(place, index, seed)
    layout = recognise(rows[0].columns, columns=place.columns, where=place.name, layouts=place.layouts)
    talks = to_conversations(rows, layout, place.columns)
    column = place.select.score if place.select else None
    scores = [0.0] * len(rows) if column is None else ratings(rows, column, where=f"{place.key}.select.score")
    found = zip(talks, rows, scores, strict=True)
    return [Conversation(talk, row.where, index, score) for talk, row, score in found], layout.name


def read_place(place: Place, index: int, seed: int) -> list[Row]:
    """Return the rows of source number ``index``, at most ``spec.max_rows`` of them, sampled with the seed.

    Raises:
        UserError: the source cannot be read, or has no rows.
    """
    random = np.random.default_rng([seed, index, CAPPED])
    cap = place.rows

    # A callback, because the number of rows is known only once the source is open.
    def some(count: int) -> Sequence[int]:
        return range(count) if cap is None else mixing.draw(count, min(cap, count), random)

    return read_source(
        place.source, split=place.split, revision=place.revision, wanted=some, texts=place.texts
    )


def ratings(rows: list[Row], column: str, *, where: str) -> list[float]:
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
            problems.append(Problem(row.where, f"field '{column}': found {value!r}", "a number"))
        scores.append(score)
    if problems:
        raise UserError(first_of(problems, len(rows)))
    return scores


def _split(
    rows: list[Conversation], share: int | float | str, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the training rows and the held-out rows of a single source."""
    if isinstance(share, str):
        return rows, []
    count = held_out_count(len(rows), share)
    # The number of rows is part of the seed: another data set gets another split.
    chosen = set(np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count].tolist())
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]


def held_out_count(rows: int, share: int | float) -> int:
    """Return the number of held-out rows of a source: a count, or a fraction of its usable rows.

    Raises:
        UserError: no training row would remain.
    """
    # A fraction holds out at least one row.
    count = share if isinstance(share, int) else max(1, round(share * rows)) if share else 0
    if count and count >= rows:
        found = f"{count} of {rows} usable rows"
        raise UserError(Problem("data.held_out", found, "fewer rows, so that some remain for training"))
    return count


def count_copies(rows: Sequence[Said], report: DataReport) -> None:
    """Count exact duplicates of an earlier row; they are reported, not dropped."""
    first: dict[object, str] = {}
    for row in rows:
        if row.words in first:
            report.count(
                "identical to an earlier row (not dropped)", f"{row.where} repeats {first[row.words]}"
            )
        else:
            first[row.words] = row.where


def count_seen(held_out: Sequence[Said], train: Sequence[Said], aside: DataReport) -> None:
    """Count held-out rows that are also training rows (leakage)."""
    if held_out:
        learnt = {row.words: row.where for row in train}
        for row in held_out:
            if row.words in learnt:
                aside.count("identical to a training row", f"{row.where} repeats {learnt[row.words]}")
