"""Dataset layouts: Alpaca, ShareGPT, messages and others, detected by column names, parsed to messages."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from data_templates.segments import DOCUMENT_START, Message
from finetune.data.contents import THOUGHTS
from finetune.data.fields import RowError, alias_field, checked_text, json_cell, short_repr, text_field
from finetune.data.tool_calls import TOOLS_FORMAT, tools_to_json_lines
from finetune.data.turns import looks_like_turns, parse_history, parse_turns
from finetune.recipe.errors import Problem, UserError, did_you_mean

SYSTEM_COLUMNS = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")
CONTEXT_COLUMNS = (*SYSTEM_COLUMNS, *TOOL_COLUMNS, "history")
"""Columns that every conversation may have: system prompt, tools, and the turns before its own."""
_CONTEXT, _THOUGHTS = frozenset(CONTEXT_COLUMNS), frozenset(THOUGHTS)

MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
"""Columns that a model of texts cannot read."""
QUALITY_COLUMNS = frozenset(
    {"chosen", "rejected", "rejected_response", "rejected_messages", "label", "kto_tag", "score", "loss_mask"}
)
"""Columns that say which replies are good: without them, bad ones are trained too."""

Parsed = TypeVar("Parsed")
"""What a layout parses a row into: messages here, completions of a prompt in preference data."""
OtherParsed = TypeVar("OtherParsed")

END_OF_TEXT = "<|endoftext|>"
"""End mark of completions written for OpenAI's fine-tuning, such as T0's tasks."""


@dataclass(frozen=True, slots=True)
class Layout(Generic[Parsed]):
    """A published layout, detected by its required columns.

    Attributes:
        name: its name.
        required: columns that every row has.
        parse: returns what a row means, or raises RowError. It is pure.
        optional: further columns that are read.
        turns: columns that may hold turns; JSON of turns in a text is read as turns.
        lists: columns that hold lists; JSON in a text is read as a list.
        members: the keys that are read of the objects in a list, per column.
        marks: required columns that tell the layout, and are not read.
        stops: columns that would change the meaning of a row, and that this layout does not read.
    """

    name: str
    required: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Parsed]
    optional: tuple[str, ...] = CONTEXT_COLUMNS
    turns: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    members: tuple[tuple[str, tuple[str, ...]], ...] = ()
    marks: tuple[str, ...] = ()
    stops: frozenset[str] = MEDIA | QUALITY_COLUMNS

    @property
    def columns(self) -> tuple[str, ...]:
        """Return all columns that are read."""
        return (*self.required, *self.optional)

    def with_parser(self, parse: Callable[[Mapping[str, Any]], OtherParsed]) -> "Layout[OtherParsed]":
        """Return a layout of the same columns, parsed to something else of which no reply is trained."""
        return Layout(
            self.name,
            self.required,
            parse,
            self.optional,
            self.turns,
            self.lists,
            self.members,
            self.marks,
            MEDIA,
        )


def with_context(columns: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Insert the row's system prompt, tools and ``history``; a system turn wins over a column."""
    # Most rows have none of these columns.
    if _CONTEXT.isdisjoint(columns):
        return messages
    head = messages[:1] if messages[0].role == "system" else system_turn(columns)
    turns = messages[1:] if messages[0].role == "system" else messages
    history = parse_history(columns.get("history"), "history")
    return [*head, *_tools_turn(columns), *history, *turns]


def system_turn(columns: Mapping[str, Any]) -> list[Message]:
    """Return a row's system turn, or [] if its columns are blank or missing."""
    text = alias_field(columns, SYSTEM_COLUMNS)
    return [Message("system", text)] if text else []


def _tools_turn(columns: Mapping[str, Any]) -> list[Message]:
    lines = {}
    for name in TOOL_COLUMNS:
        try:
            lines[name] = checked_text(tools_to_json_lines(columns.get(name)), name)
        except RowError:
            raise
        except ValueError as error:
            raise RowError(name, str(error), TOOLS_FORMAT, f"'data.ignore_columns=[{name}]'") from error
    # `functions` is OpenAI's former name; tools in both are one list.
    tools = "\n".join(dict.fromkeys(line for text in lines.values() for line in text.split("\n") if line))
    return [Message("tools", tools)] if tools else []


def _with_thought(columns: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Return turns in which the last one has the thought of the row's column, if there is one."""
    if _THOUGHTS.isdisjoint(columns):
        return turns
    # Only text: such columns may also hold a switch of the template (`thinking: true`).
    texts = {name: columns[name] for name in THOUGHTS if isinstance(columns.get(name), str)}
    thought = alias_field(texts, THOUGHTS)
    if not thought or turns[-1].reasoning.strip() == thought.strip():
        return turns
    if turns[-1].role != "assistant" or turns[-1].reasoning:
        name = next(name for name in texts if texts[name].strip())
        expected = "a last turn that is a reply, without another thought"
        raise RowError(name, f"found {short_repr(thought)}", expected, f"'data.ignore_columns=[{name}]'")
    return [*turns[:-1], replace(turns[-1], reasoning=thought)]


def _parse_alpaca(columns: Mapping[str, Any]) -> list[Message]:
    context = text_field(columns, "input", optional=True)
    user = Message("user", text_field(columns, "instruction"), context=context)
    reply = Message("assistant", text_field(columns, "output"))
    return with_context(columns, _with_thought(columns, [user, reply]))


def _prompt_reply_parser(prompt: str, completion: str) -> Callable[[Mapping[str, Any]], list[Message]]:
    def parse(columns: Mapping[str, Any]) -> list[Message]:
        if isinstance(columns[prompt], (list, dict)):
            turns = parse_turns(columns[prompt], prompt)
            return with_context(columns, [*turns, *_completion_turns(columns, completion)])
        user = Message("user", text_field(columns, prompt))
        return with_context(columns, [user, *_completion_turns(columns, completion)])

    return parse


def _completion_turns(columns: Mapping[str, Any], name: str) -> list[Message]:
    if isinstance(columns[name], (list, dict)):
        return _with_thought(columns, parse_turns(columns[name], name))
    return _with_thought(columns, [Message("assistant", text_field(columns, name))])


def _parse_t0_tasks(columns: Mapping[str, Any]) -> list[Message]:
    completion = text_field(columns, "completion").removesuffix(END_OF_TEXT)
    return with_context(
        columns, [Message("user", text_field(columns, "prompt")), Message("assistant", completion)]
    )


def _parse_natural_instructions(columns: Mapping[str, Any]) -> list[Message]:
    user = Message("user", text_field(columns, "definition"), context=text_field(columns, "inputs"))
    return with_context(columns, [user, Message("assistant", text_field(columns, "targets"))])


def _parse_rationale(columns: Mapping[str, Any]) -> list[Message]:
    """Return question, and reasoning with answer in GSM8K's notation, which template `cot` renders."""
    reply = f"{text_field(columns, 'rationale')}\n#### {text_field(columns, 'answer')}"
    return with_context(
        columns, [Message("user", text_field(columns, "question")), Message("assistant", reply)]
    )


def _parse_labeled_text(columns: Mapping[str, Any]) -> list[Message]:
    """Return a text and its label; a number or true/false, as data sets have them, is read as text."""
    label = columns["label"]
    reply = json.dumps(label) if isinstance(label, (bool, int)) else text_field(columns, "label")
    return with_context(columns, [Message("user", text_field(columns, "text")), Message("assistant", reply)])


def _conversation_parser(name: str) -> Callable[[Mapping[str, Any]], list[Message]]:
    return lambda columns: with_context(columns, parse_turns(columns[name], name))


def _conversation(name: str, column: str) -> Layout[list[Message]]:
    return Layout(name, (column,), _conversation_parser(column), turns=(column,), lists=(column,))


def _exchange(prompt: str, completion: str) -> Layout[list[Message]]:
    columns, parse = (prompt, completion), _prompt_reply_parser(prompt, completion)
    return Layout(f"{prompt}/{completion}", columns, parse, (*CONTEXT_COLUMNS, *THOUGHTS), turns=columns)


CONVERSATION_LAYOUTS: tuple[Layout[list[Message]], ...] = (
    _conversation("messages", "messages"),
    _conversation("ShareGPT", "conversations"),
    Layout("Alpaca", ("instruction", "output"), _parse_alpaca, ("input", *CONTEXT_COLUMNS, *THOUGHTS)),
    Layout("Natural Instructions", ("definition", "inputs", "targets"), _parse_natural_instructions),
    Layout("T0 tasks", ("task", "prompt", "completion"), _parse_t0_tasks, marks=("task",)),
    _exchange("prompt", "completion"),
    _exchange("prompt", "response"),
    Layout("question/rationale/answer", ("question", "rationale", "answer"), _parse_rationale),
    _exchange("question", "answer"),
    _exchange("inputs", "targets"),
    Layout("text/label", ("text", "label"), _parse_labeled_text),
)
"""In order of detection: the first layout whose required columns are all present."""


def _parse_document(columns: Mapping[str, Any]) -> list[Message]:
    return [DOCUMENT_START, Message("assistant", text_field(columns, "text"))]


DOCUMENT = Layout("text", ("text",), _parse_document, optional=(), stops=MEDIA)
"""Plain text, where the stage accepts it."""


def detect_layout(
    names: Iterable[str],
    *,
    columns: Mapping[str, str] | None = None,
    where: str = "data.source",
    layouts: Sequence[Layout[list[Message]]] = CONVERSATION_LAYOUTS,
    ignored: Collection[str] = (),
) -> Layout[list[Message]]:
    """Return the layout of a source with these column names.

    Args:
        names: the source's column names.
        columns: ``{our name: the source's name}``, the recipe's ``data.columns``.
        where: the source, for the message.
        layouts: the accepted layouts; the first that fits is returned.
        ignored: columns that count as absent, the recipe's ``data.ignore_columns``.

    Raises:
        UserError: a mapped column does not exist, or no layout fits.
    """
    repair = "map your columns: 'data.columns={instruction: QUESTION_COLUMN, output: ANSWER_COLUMN}'"
    names = [name for name in names if name not in ignored]
    if layouts[0] is DOCUMENT:
        repair = "map the text column: 'data.columns={text: YOUR_COLUMN}'"
    elif {"chosen", "rejected"} <= {*names}:
        repair += "; for preferences: llm-align dpo --data ..."
    elif "text" in names:
        repair += "; for plain text, use continued pretraining: llm-align pretrain --data ..."
    return match_layout(names, layouts, columns=columns, where=where, repair=repair)


def match_layout(
    names: Sequence[str],
    layouts: Sequence[Layout[Parsed]],
    *,
    columns: Mapping[str, str] | None,
    where: str,
    repair: str,
) -> Layout[Parsed]:
    """Return the first of these layouts that fits and reads every mapped column.

    Args:
        names: the source's column names.
        layouts: the accepted layouts.
        columns: ``{our name: the source's name}``.
        where: the source, for the message.
        repair: goes into the error if no layout fits.

    Raises:
        UserError: a mapped column does not exist, no layout fits, or none that fits reads a mapped column.
    """
    columns = columns or {}
    for ours, theirs in columns.items():
        if theirs not in names:
            actual = f"'{ours}' is mapped to '{theirs}', but {where} has no such column"
            hint = did_you_mean(theirs, names)
            if ours in names:
                hint = f"the layout's name is on the left: 'data.columns={{{theirs}: {ours}}}'"
            raise UserError(Problem("data.columns", actual, f"one of {', '.join(names)}", hint))
    # A mapped column counts under its new name only.
    known = {*(name for name in names if name not in columns.values()), *columns}
    fitting = [layout for layout in layouts if known.issuperset(layout.required)]
    # A file may have the columns of another layout too, such as text and label.
    layout = next(
        (layout for layout in fitting if {*columns} <= {*layout.columns}), next(iter(fitting), None)
    )
    if layout is None:
        expected = "; ".join("+".join(layout.required) for layout in layouts)
        raise UserError(Problem(where, f"no known layout has columns {', '.join(names)}", expected, repair))
    unread = [name for name in columns if name not in layout.columns]
    if unread:
        actual = (
            f"layout {layout.name} has no column '{unread[0]}', which '{columns[unread[0]]}' is mapped to"
        )
        suggestion = did_you_mean(unread[0], layout.columns)
        raise UserError(Problem("data.columns", actual, f"one of {', '.join(layout.columns)}", suggestion))
    return layout


def layout_values(
    row: Mapping[str, Any],
    layout: Layout[Parsed],
    columns: Mapping[str, str] | None,
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """Return a row's values by the layout's names, without ignored columns, and with JSON cells parsed."""
    columns = columns or {}
    hidden = {*columns.values(), *ignored}
    values = {name: value for name, value in row.items() if name not in hidden}
    values |= {ours: row.get(theirs) for ours, theirs in columns.items()}
    for name, value in values.items():
        # How tables write a missing text.
        if isinstance(value, float) and value != value:
            values[name] = None
    for name in (*layout.lists, *layout.turns, "history"):
        if isinstance(values.get(name), str):
            parsed = json_cell(values[name])
            # A prompt may be a text in brackets: only turns are read in place of it.
            if name in layout.lists or name == "history" or looks_like_turns(parsed):
                values[name] = parsed
    return values


def parse_values(values: Mapping[str, Any], layout: Layout[Parsed]) -> Parsed:
    """Parse the values of a row (``layout_values``); raises RowError."""
    missing = [name for name in layout.required if values.get(name) is None]
    # Null counts as missing: formats with a fixed schema (Parquet) fill absent values with it.
    if missing:
        raise RowError(missing[0], "missing or null", f"layout {layout.name}: {'+'.join(layout.required)}")
    return layout.parse(values)
