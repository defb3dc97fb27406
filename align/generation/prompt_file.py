"""Rows of a file as prompts: the prompt of each row, and its own reply where it has one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from align.rl.prompt_rows import PROMPT_LAYOUTS, PromptReader
from data_templates.segments import REPLY_ROLES, Message
from finetune.data.fields import RowError, text_field
from finetune.data.files import Source
from finetune.data.layouts import MEDIA, Layout, layout_values, match_layout, parse_values, with_context
from finetune.data.readers import SourceRow
from finetune.data.rows import first_problems, row_problem
from finetune.data.sources import iter_source
from finetune.recipe.errors import Problem, UserError, did_you_mean
from finetune.recipe.settings import TextFormat

REPLY_COLUMNS = ("completion", "response", "output", "answer", "targets", "label")
"""A row's own reply, which may be missing here."""
COLUMN_REPAIR = "name the column of the prompt: --column prompt=YOUR_COLUMN"


def _read_text(columns: Mapping[str, Any]) -> list[Message]:
    return with_context(columns, [Message("user", text_field(columns, "text"))])


READ_TEXT: PromptReader = _read_text
LAYOUTS: Sequence[Layout[list[Message]]] = (
    *PROMPT_LAYOUTS,
    Layout("text", ("text",), READ_TEXT, stops=MEDIA),
)
"""Those of RL's prompts, and a column of texts."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of a file.

    Attributes:
        columns: all of its columns.
        prompt: the turns up to the completion; None if the row has none, because it is blank.
        expected: the row's own reply, which the prompt does not have; None without one.
        location: ``file:line``.
    """

    columns: Mapping[str, Any]
    prompt: tuple[Message, ...] | None
    expected: str | None
    location: str


@dataclass(frozen=True)
class PromptFile:
    """The rows of a file with their layout, and lines on how it was read."""

    rows: Sequence[PromptRow]
    layout: str
    notes: Sequence[str]

    @property
    def names(self) -> list[str]:
        """Return the columns of all rows, in the order in which they occur."""
        return list(dict.fromkeys(name for row in self.rows for name in row.columns))


def read_prompts(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    inherited: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> PromptFile:
    """Read the prompts of a file, a folder, a Hub dataset or Python's rows.

    Args:
        source: what ``data.source`` takes; text files are prompts too, one per line.
        columns: ``{our name: the file's name}``, as in ``data.columns``.
        inherited: the same from the run's recipe, used without ``columns``; entries whose columns the file
            lacks do not count.
        limit: rows to read at most; None: all.

    Raises:
        UserError: the file cannot be read, its rows fit no layout, or some have no text where one is needed.
    """
    notes: list[str] = []
    rows = list(islice(iter_source(source, text_format=TextFormat("\n"), note=notes.append), limit))
    names = list(rows[0].columns)
    where = source if isinstance(source, str) else "rows"
    typed = dict(columns or {})
    mapping = typed or {ours: theirs for ours, theirs in (inherited or {}).items() if theirs in names}
    if unknown := [theirs for theirs in typed.values() if theirs not in names]:
        actual = f"no column '{unknown[0]}' in {where}"
        hint = did_you_mean(unknown[0], names)
        raise UserError(Problem("--column", actual, f"one of {', '.join(names)}", hint))
    layout = match_layout(names, LAYOUTS, columns=mapping, where=str(where), repair=COLUMN_REPAIR)
    return PromptFile(_parse_rows(rows, layout, mapping), layout.name, notes)


def _parse_rows(
    rows: Sequence[SourceRow], layout: Layout[list[Message]], mapping: Mapping[str, str]
) -> list[PromptRow]:
    parsed, problems = [], []
    for row in rows:
        values = layout_values(row.columns, layout, mapping)
        try:
            messages = [] if _is_blank(values, layout.required) else _messages(values, layout)
            parsed.append(_split(row, messages))
        except RowError as error:
            problems.append(row_problem(error, row.location))
    if problems:
        raise UserError(first_problems(problems, len(rows)))
    return parsed


def _messages(values: Mapping[str, Any], layout: Layout[list[Message]]) -> list[Message]:
    replies = {name: "" for name in REPLY_COLUMNS if name in layout.required and values.get(name) is None}
    return parse_values({**values, **replies}, layout)


def _is_blank(values: Mapping[str, Any], required: Collection[str]) -> bool:
    """Return whether a row has nothing to answer: no text in the columns of the prompt."""
    asked = [values.get(name) for name in required if name not in REPLY_COLUMNS]
    return all(value is None or (isinstance(value, str) and not value.strip()) for value in asked)


def _split(row: SourceRow, messages: list[Message]) -> PromptRow:
    """Split a row into prompt and reply; raises RowError if no user turn is left."""
    turns, expected = list(messages), None
    while turns and turns[-1].role in REPLY_ROLES:
        reply = turns.pop()
        expected = reply.content or reply.tool_calls or None
    if turns and turns[-1].role not in ("user", "observation"):
        raise RowError(turns[-1].role, "the last turn before the reply", "a user's turn to answer")
    return PromptRow(row.columns, tuple(turns) or None, expected, row.location)
