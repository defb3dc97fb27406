"""Prompts as a kind of rows: conversations up to the last user turn, held out by prompt."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.preference.rows.comparison_rows import prompt_groups, split_by_prompt
from align.preference.rows.fields import prompt_turns
from align.preference.rows.layouts import INSTRUCTION_COLUMNS, LABELED, RANKINGS, PreferenceRow
from data_templates.segments import REPLY_ROLES, Message
from finetune.data.conversation import Conversation
from finetune.data.fields import text_field
from finetune.data.layouts import CONVERSATION_LAYOUTS, MEDIA, Layout, match_layout, with_context
from finetune.data.load import SELECT_STREAM, Ids, SourceSpec, open_source
from finetune.data.mixture import MixtureComponent
from finetune.data.report import DataReport, SourceReport
from finetune.data.row_store import Rows, RowStore
from finetune.data.selection import select_rows
from finetune.recipe.errors import Problem, UserError

NAME_PROMPT_COLUMN = "name the column of the prompt: 'data.columns={prompt: QUESTION_COLUMN}'"
NO_USER_TURN = "dropped: the prompt does not end with a user turn"
EMPTY_PROMPT_TURN = "dropped: empty turn in the prompt"

PromptTurns = tuple[Message, ...]
PromptColumns = Mapping[str, Any]
PromptReader = Callable[[PromptColumns], list[Message]]


def _best_reply_reader(read_row: Callable[[PromptColumns], PreferenceRow]) -> PromptReader:
    """Return a reader of the prompt with its best reply, or without a reply if none is known to be good."""

    def read_messages(columns: PromptColumns) -> list[Message]:
        row = read_row(columns)
        best = (
            row.completions[0]
            if row.ordered
            else max(row.completions, key=lambda completion: completion.score)
        )
        # A single completion that is labeled bad is no reference answer.
        is_bad = len(row.completions) == 1 and best.score == 0
        return [*best.prompt, *([best.reply] if best.reply is not None and not is_bad else [])]

    return read_messages


def _instruction_messages(columns: PromptColumns) -> list[Message]:
    context = text_field(columns, "input", optional=True)
    return with_context(columns, [Message("user", text_field(columns, "instruction"), context=context)])


def _prompt_reader(name: str) -> PromptReader:
    return lambda columns: with_context(columns, prompt_turns(columns, name))


PROMPT_LAYOUTS: Sequence[Layout[list[Message]]] = (
    *(layout.with_parser(_best_reply_reader(layout.parse)) for layout in (*RANKINGS, *LABELED)),
    # The row's own replies are not trained: a column that says whether they are good changes nothing.
    *(layout.with_parser(layout.parse) for layout in CONVERSATION_LAYOUTS),
    Layout("prompt", ("prompt",), _prompt_reader("prompt"), turns=("prompt",), stops=MEDIA),
    Layout("instruction", ("instruction",), _instruction_messages, INSTRUCTION_COLUMNS, stops=MEDIA),
    Layout("question", ("question",), _prompt_reader("question"), turns=("question",), stops=MEDIA),
)
"""The first layout that matches is used: preference data, conversations, plain prompts."""


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A row before tokenization: the turns up to the completion, and the row's own reply if it has one."""

    prompt: PromptTurns
    expected: str | None
    location: str
    source_index: int

    @property
    def text_key(self) -> object:
        """Return the key by which duplicate prompts are found: role and texts of each turn."""
        return tuple(turn.key for turn in self.prompt)


@dataclass(frozen=True)
class PromptRows:
    """Prompts, with the row's own reply as a reference answer."""

    def load(
        self, spec: SourceSpec, index: int, seed: int, report: DataReport
    ) -> MixtureComponent[RawPrompt]:
        """Return a source's prompts."""
        return load_source_prompts(spec, index, seed, report)

    def split(self, rows: Rows[RawPrompt], held_out: int | float, seed: int) -> tuple[Ids, Ids]:
        """Split by prompt, not by row: copies of a prompt would leak into the held-out split."""
        return split_by_prompt(rows, held_out, seed)

    def groups(self, rows: Rows[RawPrompt]) -> Ids:
        """Return the prompt of each row, as a number."""
        return prompt_groups(rows)

    def count_relations(
        self,
        rows: Rows[RawPrompt],
        splits: tuple[Rows[RawPrompt], Rows[RawPrompt]],
        reports: tuple[DataReport, DataReport],
    ) -> None:
        """Count nothing more: prompts have no relations but duplicates."""


def load_source_prompts(
    spec: SourceSpec, index: int, seed: int, report: DataReport
) -> MixtureComponent[RawPrompt]:
    """Return the prompts of source number ``index``.

    Raises:
        UserError: the source cannot be read, its rows match no layout, or no row has a prompt.
    """

    def match(names: list[str]) -> Layout[list[Message]]:
        return match_layout(
            names, PROMPT_LAYOUTS, columns=spec.columns, where=spec.name, repair=NAME_PROMPT_COLUMN
        )

    layout, parsed = open_source(spec, index, seed, match, report)
    store = RowStore(Conversation(messages, row.location, index, rating) for messages, row, rating in parsed)
    rows = store.rows()
    if spec.select is not None:
        rng = np.random.default_rng([seed, index, SELECT_STREAM])
        rows = select_rows(rows, spec.select, rng=rng, report=report)
    prompts = RowStore(_split_prompts(rows, report)).rows()
    if not prompts:
        actual = f"nothing to answer: {'; '.join(report.lines()[1:])}"
        repair = f"check the rows above, or {'select more rows' if spec.select else NAME_PROMPT_COLUMN}"
        raise UserError(Problem(spec.key, actual, "rows with a user turn", repair))
    source_report = SourceReport(spec.name, layout.name, num_read=len(store), num_usable=len(prompts))
    return MixtureComponent(source_report, prompts)


def _split_prompts(rows: Iterable[Conversation], report: DataReport) -> Iterator[RawPrompt]:
    """Split rows into prompt and final reply; rows without a prompt are dropped and counted."""
    for row in rows:
        messages, expected = list(row.messages), None
        while messages and messages[-1].role in REPLY_ROLES:
            reply = messages.pop()
            # The answer without its thought, as a reference for graders.
            expected = reply.content or reply.tool_calls
        # "observation" is a tool's result, which the policy answers as it does a user.
        if not messages or messages[-1].role not in ("user", "observation"):
            report.count(NO_USER_TURN, row.location)
        elif any(turn.is_empty for turn in messages):
            report.count(EMPTY_PROMPT_TURN, row.location)
        else:
            yield RawPrompt(tuple(messages), expected or None, row.location, row.source_index)
