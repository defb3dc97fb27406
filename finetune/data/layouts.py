"""Dataset layouts: Alpaca, ShareGPT, messages and others, detected by column names, parsed to messages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from data_templates._segments import DOCUMENT_START, Message, Role
from finetune.data.sources import Row
from finetune.data.tool_calls import CALL, TOOLS, call_lines, tool_lines
from finetune.recipe.errors import Problem, UserError, nearest

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "function_call",
    "observation": "observation",
}
FLAGS = ("trained", "train", "weight")
"""Keys by which published layouts mark a turn as trained or not (axolotl: train; OpenAI: weight, 0 or 1)."""

Read = TypeVar("Read")
"""What a layout parses a row into: messages here, completions of a prompt in preference data."""

MAX_TOLD = 5
END_MARK = "<|endoftext|>"
"""End mark of completions written for OpenAI's fine-tuning, such as T0's tasks."""


class RowProblem(ValueError):
    """A field of a row that does not fit the layout."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(f"{field}: {found}, expected {expected}")
        self.field, self.found, self.expected = field, found, expected


@dataclass(frozen=True, slots=True)
class Layout(Generic[Read]):
    """A published layout: name, required columns (those that identify it), and the parser of a row."""

    name: str
    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Read]
    nullable: tuple[str, ...] = ()


def _alpaca(columns: Mapping[str, Any]) -> list[Message]:
    user = Message(
        "user", text_field(columns, "instruction"), context=text_field(columns, "input", optional=True)
    )
    return [*system_turn(columns), user, Message("assistant", text_field(columns, "output"))]


def _pair(prompt: str, completion: str) -> Callable[[Mapping[str, Any]], list[Message]]:
    def read(columns: Mapping[str, Any]) -> list[Message]:
        if isinstance(columns[prompt], list):
            return turns_field(columns, prompt, "role", "content") + turns_field(
                columns, completion, "role", "content"
            )
        user = Message("user", text_field(columns, prompt))
        return [*system_turn(columns), user, Message("assistant", text_field(columns, completion))]

    return read


def _tasks(columns: Mapping[str, Any]) -> list[Message]:
    completion = text_field(columns, "completion").removesuffix(END_MARK)
    return [Message("user", text_field(columns, "prompt")), Message("assistant", completion)]


def _natural_instructions(columns: Mapping[str, Any]) -> list[Message]:
    user = Message("user", text_field(columns, "definition"), context=text_field(columns, "inputs"))
    return [user, Message("assistant", text_field(columns, "targets"))]


def _rationale(columns: Mapping[str, Any]) -> list[Message]:
    """Return question, and reasoning with answer in GSM8K's notation, which template `cot` renders."""
    reasoned = f"{text_field(columns, 'rationale')}\n#### {text_field(columns, 'answer')}"
    return [
        *system_turn(columns),
        Message("user", text_field(columns, "question")),
        Message("assistant", reasoned),
    ]


def _messages(columns: Mapping[str, Any]) -> list[Message]:
    return _with_tools(columns, turns_field(columns, "messages", "role", "content"))


def _conversations(columns: Mapping[str, Any]) -> list[Message]:
    turns = columns["conversations"]
    openai = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]
    names = ("role", "content") if openai else ("from", "value")
    messages = turns_field(columns, "conversations", *names)
    # ShareGPT may have the system prompt as a first turn or as a column of its own; the turn wins.
    own = messages[:1] and messages[0].role == "system"
    return _with_tools(columns, messages if own else [*system_turn(columns), *messages])


def _with_tools(columns: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Insert the row's tools after its system turn."""
    try:
        lines = tool_lines(columns.get("tools"))
    except ValueError as error:
        raise RowProblem("tools", str(error), TOOLS) from error
    head = 1 if messages[0].role == "system" else 0
    tools = [Message("tools", checked_text(lines, "tools"))] if lines else []
    return [*messages[:head], *tools, *messages[head:]]


LAYOUTS: tuple[Layout[list[Message]], ...] = (
    Layout("messages with tools", ("messages", "tools"), _messages, nullable=("tools",)),
    Layout("messages", ("messages",), _messages),
    Layout("ShareGPT with tools", ("conversations", "tools"), _conversations, nullable=("tools",)),
    Layout("ShareGPT", ("conversations",), _conversations),
    Layout("Alpaca", ("instruction", "output"), _alpaca),
    Layout("Natural Instructions", ("definition", "inputs", "targets"), _natural_instructions),
    Layout("T0 tasks", ("task", "prompt", "completion"), _tasks),
    Layout("prompt/completion", ("prompt", "completion"), _pair("prompt", "completion")),
    Layout("prompt/response", ("prompt", "response"), _pair("prompt", "response")),
    Layout("question/rationale/answer", ("question", "rationale", "answer"), _rationale),
    Layout("question/answer", ("question", "answer"), _pair("question", "answer")),
    Layout("inputs/targets", ("inputs", "targets"), _pair("inputs", "targets")),
)
"""In order of detection: the first layout whose required columns are all present."""


def _document(columns: Mapping[str, Any]) -> list[Message]:
    return [DOCUMENT_START, Message("assistant", text_field(columns, "text"))]


DOCUMENT = Layout("text", ("text",), _document)
"""Plain text, where the stage accepts it."""


def recognise(
    names: Iterable[str],
    *,
    columns: Mapping[str, str] | None = None,
    where: str = "data.source",
    layouts: Sequence[Layout[list[Message]]] = LAYOUTS,
) -> Layout[list[Message]]:
    """Return the layout of a source with these column names.

    Args:
        names: the source's column names.
        columns: ``{our name: the source's name}``, the recipe's ``data.columns``.
        where: the source, for the message.
        layouts: the accepted layouts; the first that fits is returned.

    Raises:
        UserError: a mapped column does not exist, or no layout fits.
    """
    repair = "map your columns: data.columns={instruction: QUESTION_COLUMN, output: ANSWER_COLUMN}"
    names = list(names)
    if layouts[0] is DOCUMENT:
        repair = "map the text column: data.columns={text: YOUR_COLUMN}"
    elif "text" in names:
        repair += "; for plain text, use continued pretraining: llm-align pretrain --data ..."
    return recognise_among(names, layouts, columns=columns, where=where, repair=repair)


def recognise_among(
    names: Sequence[str],
    layouts: Sequence[Layout[Read]],
    *,
    columns: Mapping[str, str] | None,
    where: str,
    repair: str,
) -> Layout[Read]:
    """Return the first of these layouts that fits; ``repair`` goes into the error if none does.

    Raises:
        UserError: a mapped column does not exist, or no layout fits.
    """
    for ours, theirs in (columns or {}).items():
        if theirs not in names:
            found = f"'{ours}' is mapped to '{theirs}', but {where} has no such column"
            raise UserError(
                Problem("data.columns", found, f"one of {', '.join(names)}", nearest(theirs, names))
            )
    # A mapped column counts under its new name only.
    known = {*(name for name in names if name not in (columns or {}).values()), *(columns or {})}
    for layout in layouts:
        if known.issuperset(layout.required):
            return layout
    expected = "; ".join("+".join(layout.required) for layout in layouts)
    raise UserError(Problem(where, f"no known layout has columns {', '.join(names)}", expected, repair))


def to_conversations(
    rows: list[Row], layout: Layout[list[Message]], columns: Mapping[str, str] | None
) -> list[list[Message]]:
    """Return each row's messages; raises as ``parse_rows`` does."""
    return read_rows(rows, layout, columns)


def read_rows(rows: list[Row], layout: Layout[Read], columns: Mapping[str, str] | None) -> list[Read]:
    """Parse each row by a layout.

    Raises:
        UserError: some rows do not fit the layout; the first few are listed with file, line and field.
    """
    read, problems = [], []
    for row in rows:
        values = {
            **row.columns,
            **{ours: row.columns.get(theirs) for ours, theirs in (columns or {}).items()},
        }
        try:
            needed = [name for name in layout.required if name not in layout.nullable]
            missing = [name for name in needed if values.get(name) is None]
            if missing:
                raise RowProblem(
                    missing[0], "missing or null", f"layout {layout.name}: {'+'.join(layout.required)}"
                )
            read.append(layout.read(values))
        except RowProblem as error:
            problems.append(Problem(row.where, f"field '{error.field}': {error.found}", error.expected))
    if problems:
        raise UserError(first_of(problems, len(rows)))
    return read


def first_of(problems: list[Problem], rows: int) -> list[Problem]:
    """Return the first few of many rows' problems, and one that counts the rest."""
    more = len(problems) - MAX_TOLD
    if more <= 0:
        return problems
    rest = Problem(
        f"and {more} more rows", f"{len(problems)} of {rows} rows do not fit", "one layout for all rows"
    )
    return [*problems[:MAX_TOLD], rest]


def text_field(columns: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    """Return a column's text, "" for a missing optional one; raises RowProblem."""
    value = columns.get(name)
    if value is None and optional:
        return ""
    return checked_text(value, name)


def checked_text(value: Any, field: str) -> str:
    """Return the value if it is valid text; raises RowProblem otherwise."""
    if not isinstance(value, str):
        raise RowProblem(field, f"found {short(value)}", "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # A lone surrogate: JSON can write one (\ud83d), UTF-8 and tokenizers cannot.
        found = f"an unpaired surrogate ({value[error.start]!r}) at position {error.start + 1}"
        raise RowProblem(field, found, "valid Unicode") from error
    return value


def system_turn(columns: Mapping[str, Any]) -> list[Message]:
    """Return a row's system turn, or [] if its column is empty or missing."""
    text = text_field(columns, "system", optional=True)
    return [Message("system", text)] if text else []


def turns_field(columns: Mapping[str, Any], name: str, role_key: str, text_key: str) -> list[Message]:
    """Parse a column that holds a list of turns; raises RowProblem."""
    turns = columns[name]
    if not isinstance(turns, list) or not turns:
        raise RowProblem(name, f"found {short(turns)}", f"a list of turns with {role_key} and {text_key}")
    return [_turn(turn, f"{name}[{index}]", role_key, text_key) for index, turn in enumerate(turns)]


def _turn(turn: Any, field: str, role_key: str, text_key: str) -> Message:
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        raise RowProblem(field, f"found {short(turn)}", f"an object with {role_key} and {text_key}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise RowProblem(f"{field}.{role_key}", f"found {short(role)}", f"one of {', '.join(ROLES)}")
    text = turn[text_key]
    if role == "function_call":
        try:
            text = call_lines(text)
        except ValueError as error:
            raise RowProblem(f"{field}.{text_key}", str(error), CALL) from error
    text = checked_text(text, f"{field}.{text_key}")
    return Message(ROLES[role], text, trained=_trained(turn, field))


def _trained(turn: Mapping[str, Any], field: str) -> bool:
    """Return a turn's train flag: ``trained`` or axolotl's ``train`` (true, false), or OpenAI's ``weight``.

    Only replies use the flag.
    """
    for name in FLAGS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowProblem(
                f"{field}.{name}", f"found {short(value)}", "true or 1 (train on it), false or 0"
            )
        if not value:
            return False
    return True


def short(value: Any) -> str:
    """Return a value's repr for messages, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
