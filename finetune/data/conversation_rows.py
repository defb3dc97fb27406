"""Conversations and documents as a kind of rows: which are usable, selected and held out."""

from dataclasses import dataclass

import numpy as np

from data_templates.segments import Message
from finetune.data.conversation import Conversation, usable_turns
from finetune.data.layouts import Layout, detect_layout
from finetune.data.load import (
    SELECT_STREAM,
    Ids,
    SourceSpec,
    open_source,
    split_rows,
)
from finetune.data.mixture import MixtureComponent
from finetune.data.report import DataReport, SourceReport
from finetune.data.row_store import Rows, RowStore
from finetune.data.selection import select_rows
from finetune.recipe.errors import Problem, UserError


@dataclass(frozen=True)
class ConversationRows:
    """Conversations and documents."""

    def load(
        self, spec: SourceSpec, index: int, seed: int, report: DataReport
    ) -> MixtureComponent[Conversation]:
        """Return a source's conversations: parsed, usable, selected."""
        return load_conversations(spec, index, seed, report)

    def split(self, rows: Rows[Conversation], held_out: int | float, seed: int) -> tuple[Ids, Ids]:
        """Return random training and held-out rows."""
        return split_rows(len(rows), held_out, seed)

    def groups(self, rows: Rows[Conversation]) -> None:
        """Return None: each row is held out by itself."""

    def count_relations(
        self,
        rows: Rows[Conversation],
        splits: tuple[Rows[Conversation], Rows[Conversation]],
        reports: tuple[DataReport, DataReport],
    ) -> None:
        """Count nothing more: conversations have no relations but duplicates."""


def load_conversations(
    spec: SourceSpec, index: int, seed: int, report: DataReport
) -> MixtureComponent[Conversation]:
    """Return the usable conversations of source number ``index``; ``report`` counts the others.

    Raises:
        UserError: the source cannot be read, its rows fit no layout, or none is usable.
    """

    def match(names: list[str]) -> Layout[list[Message]]:
        return detect_layout(names, columns=spec.columns, where=spec.name, layouts=spec.layouts)

    layout, parsed = open_source(spec, index, seed, match, report)
    store, num_read = RowStore[Conversation](), 0
    for messages, row, rating in parsed:
        num_read += 1
        turns = usable_turns(messages, row.location, report)
        if turns is not None:
            store.append(Conversation(turns, row.location, index, rating))
    rows = store.rows()
    # Per source, before mixing: rates by size refer to the selected rows.
    if spec.select is not None:
        rng = np.random.default_rng([seed, index, SELECT_STREAM])
        rows = select_rows(rows, spec.select, rng=rng, report=report)
    if not rows:
        raise no_usable_rows(spec.key, report, selects=spec.select is not None)
    return MixtureComponent(
        SourceReport(spec.name, layout.name, num_read=num_read, num_usable=len(rows)), rows
    )


def no_usable_rows(key: str, report: DataReport, *, selects: bool = False) -> UserError:
    """Return the error of a source without a row to train or to evaluate on."""
    purpose = "to evaluate on" if key.startswith(("data.held_out", "evaluate.")) else "to train on"
    actual = f"no row {purpose}: {'; '.join(report.lines()[1:])}"
    remedy = "map other columns: 'data.columns={instruction: Q, output: A}'"
    if selects:
        remedy = "loosen the select filters"
    elif report.num_too_long:
        remedy = "raise data.max_length"
    elif any("template cannot render" in label for label in report.counts):
        remedy = "choose another data.template"
    repair = f"check the rows named above, or {remedy}"
    return UserError(Problem(key, actual, "rows with an assistant reply", repair))
