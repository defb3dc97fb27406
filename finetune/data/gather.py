"""From a recipe's data section to conversations: read, chosen, mixed, and kept apart."""

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
"""What a source's random streams are for: each draw has its own, so that none disturbs another."""


class Said(Protocol):
    """A row whose words and place are known."""

    @property
    def words(self) -> object:
        """Return what is said, by whom: two rows with the same are copies of each other."""

    @property
    def where(self) -> str:
        """Return the row's place (``file:line``)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows are and which of them are wanted; ``key`` is the recipe's key."""

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
        """Return what messages call the source."""
        return self.source if isinstance(self.source, str) else self.key


def gather(
    settings: DataSettings, seed: int, report: DataReport, aside: DataReport
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the rows to learn and the rows held out.

    Args:
        settings: the recipe's data section.
        seed: draws a mixture's rows and the rows held out.
        report: counts what was lost and tells what each source gives.
        aside: counts what a held-out file lost.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or there is nothing left to learn.
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
    """Return the usable conversations of a file that stands beside the data, such as a held-out one.

    Raises:
        UserError: it cannot be read, or its rows fit no layout.
    """
    return usable(_conversations(place, 0, seed)[0], report)


def places_of(settings: DataSettings) -> list[Place]:
    """Return where a data section's rows are: its source, or those of its mixture."""
    if settings.mix is None:
        assert settings.source is not None
        where = settings.split, settings.revision, settings.columns
        places = [Place("data.source", settings.source, *where, select=settings.select)]
    else:
        places = [_place(index, part, settings.split) for index, part in enumerate(settings.mix)]
    return [_as_texts(place, settings.texts) for place in places]


def _as_texts(place: Place, texts: Texts | None) -> Place:
    """Return a place whose rows are plain texts where they can be; the same place without ``texts``."""
    return place if texts is None else replace(place, layouts=(DOCUMENT, *LAYOUTS), texts=texts)


def _place(index: int, part: MixedSource, split: str) -> Place:
    where = part.split or split, part.revision, part.columns
    # Plain text among conversations is meant where it has a share of its own; elsewhere it is a mistake.
    layouts = LAYOUTS if part.share is None else (*LAYOUTS, DOCUMENT)
    return Place(f"data.mix[{index}]", part.source, *where, part.rows, part.select, layouts)


def _part(place: Place, index: int, seed: int, report: DataReport) -> Part[Conversation]:
    found, layout = _conversations(place, index, seed)
    rows = usable(found, report)
    if place.select is not None:
        random = np.random.default_rng([seed, index, SELECTED])
        rows = select(rows, place.select, random=random, report=report)
    if not rows:
        told = f"nothing to learn from: {'; '.join(report.lines()[1:])}"
        other = "data.columns={instruction: Q, output: A} reads other columns"
        repair = f"look at the rows named above, or {'choose fewer away' if place.select else other}"
        raise UserError(Problem(place.key, told, "rows with replies", repair))
    return Part(SourceReport(place.name, layout, found=len(found), usable=len(rows)), rows)


def _conversations(place: Place, index: int, seed: int) -> tuple[list[Conversation], str]:
    """Return a source's rows as conversations, and the name of their layout."""
    rows = read_place(place, index, seed)
    layout = recognise(rows[0].columns, columns=place.columns, where=place.name, layouts=place.layouts)
    talks = to_conversations(rows, layout, place.columns)
    column = place.select.score if place.select else None
    scores = [0.0] * len(rows) if column is None else ratings(rows, column, where=f"{place.key}.select.score")
    found = zip(talks, rows, scores, strict=True)
    return [Conversation(talk, row.where, index, score) for talk, row, score in found], layout.name


def read_place(place: Place, index: int, seed: int) -> list[Row]:
    """Return the rows of source number ``index``, as many as are wanted of it.

    Raises:
        UserError: the source cannot be read, or holds no rows.
    """
    random = np.random.default_rng([seed, index, CAPPED])
    cap = place.rows

    def some(count: int) -> Sequence[int]:
        return range(count) if cap is None else mixing.draw(count, min(cap, count), random)

    return read_source(
        place.source, split=place.split, revision=place.revision, wanted=some, texts=place.texts
    )


def ratings(rows: list[Row], column: str, *, where: str) -> list[float]:
    """Return each row's rating; numbers written as text count as numbers.

    Raises:
        UserError: there is no such column, or rows in which it holds no number.
    """
    if column not in rows[0].columns:
        names = ", ".join(rows[0].columns)
        raise UserError(Problem(where, f"'{column}' is no column of the source", f"one of {names}"))
    scores, problems = [], []
    for row in rows:
        value = row.columns.get(column)
        try:
            score = float(value) if isinstance(value, (int, float, str)) else float("nan")
        except ValueError:
            score = float("nan")
        if isinstance(value, bool) or not isfinite(score):
            problems.append(Problem(row.where, f"field '{column}': found {value!r}", "a number"))
        scores.append(score)
    if problems:
        raise UserError(first_of(problems, len(rows)))
    return scores


def _split(
    rows: list[Conversation], share: int | float | str, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the rows to learn and the rows held out of a single source."""
    if isinstance(share, str):
        return rows, []
    count = held_out_count(len(rows), share)
    chosen = set(np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count].tolist())
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]


def held_out_count(rows: int, share: int | float) -> int:
    """Return how many of a source's usable rows are held out.

    Raises:
        UserError: no row would be left to learn from.
    """
    count = share if isinstance(share, int) else max(1, round(share * rows)) if share else 0
    if count and count >= rows:
        found = f"{count} of {rows} usable rows"
        raise UserError(Problem("data.held_out", found, "fewer rows than there are"))
    return count


def count_copies(rows: Sequence[Said], report: DataReport) -> None:
    """Count the rows that say what an earlier one says."""
    first: dict[object, str] = {}
    for row in rows:
        if row.words in first:
            report.count("equal to an earlier one, kept", f"{row.where} repeats {first[row.words]}")
        else:
            first[row.words] = row.where


def count_seen(held_out: Sequence[Said], train: Sequence[Said], aside: DataReport) -> None:
    """Count the rows held out that are learnt too."""
    if held_out:
        learnt = {row.words: row.where for row in train}
        for row in held_out:
            if row.words in learnt:
                aside.count("equal to one that is learnt", f"{row.where} repeats {learnt[row.words]}")
