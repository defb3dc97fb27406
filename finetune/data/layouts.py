"""Dataset layouts: Alpaca, ShareGPT, messages and others, detected by column names, parsed to messages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from data_templates.segments import DOCUMENT_START, Message, Role
from finetune.data.conversation import CALL_FORMAT, TOOLS_FORMAT, calls_to_json_lines, tools_to_json_lines
from finetune.data.readers import SourceRow
from finetune.recipe.errors import Problem, UserError, did_you_mean

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "observation",
}
TRAIN_FLAGS = ("trained", "train", "weight")
"""Keys by which published layouts mark a turn as trained or not (axolotl: train; OpenAI: weight, 0 or 1)."""

Parsed = TypeVar("Parsed")
"""What a layout parses a row into: messages here, completions of a prompt in preference data."""

MAX_REPORTED = 5
END_OF_TEXT = "<|endoftext|>"
"""End mark of completions written for OpenAI's fine-tuning, such as T0's tasks."""


class RowError(ValueError):
    """A field of a row that does not fit the layout."""

    def __init__(self, field: str, actual: str, expected: str) -> None:
        super().__init__(f"{field}: {actual}, expected {expected}")
        self.field, self.actual, self.expected = field, actual, expected


@dataclass(frozen=True, slots=True)
class Layout(Generic[Parsed]):
    """A published layout: name, required columns (some may be ``nullable``), and the parser of a row."""

    name: str
    required: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Parsed]
    nullable: tuple[str, ...] = ()


def _parse_alpaca(columns: Mapping[str, Any]) -> list[Message]:
    user = Message(
        "user", text_field(columns, "instruction"), context=text_field(columns, "input", optional=True)
    )
    return [*system_turn(columns), user, Message("assistant", text_field(columns, "output"))]


def _prompt_reply_parser(prompt: str, completion: str) -> Callable[[Mapping[str, Any]], list[Message]]:
    def parse(columns: Mapping[str, Any]) -> list[Message]:
        if isinstance(columns[prompt], list):
            return turns_field(columns, prompt, "role", "content") + turns_field(
                columns, completion, "role", "content"
            )
        user = Message("user", text_field(columns, prompt))
        return [*system_turn(columns), user, Message("assistant", text_field(columns, completion))]

    return parse


def _parse_t0_tasks(columns: Mapping[str, Any]) -> list[Message]:
    completion = text_field(columns, "completion").removesuffix(END_OF_TEXT)
    return [Message("user", text_field(columns, "prompt")), Message("assistant", completion)]


def _parse_natural_instructions(columns: Mapping[str, Any]) -> list[Message]:
    user = Message("user", text_field(columns, "definition"), context=text_field(columns, "inputs"))
    return [user, Message("assistant", text_field(columns, "targets"))]


def _parse_rationale(columns: Mapping[str, Any]) -> list[Message]:
    """Return question, and reasoning with answer in GSM8K's notation, which template `cot` renders."""
    reply = f"{text_field(columns, 'rationale')}\n#### {text_field(columns, 'answer')}"
    return [
        *system_turn(columns),
        Message("user", text_field(columns, "question")),
        Message("assistant", reply),
    ]


def _parse_messages(columns: Mapping[str, Any]) -> list[Message]:
    return _with_tools(columns, turns_field(columns, "messages", "role", "content"))


def _parse_sharegpt(columns: Mapping[str, Any]) -> list[Message]:
    turns = columns["conversations"]
    openai = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]
    names = ("role", "content") if openai else ("from", "value")
    messages = turns_field(columns, "conversations", *names)
    # ShareGPT may have the system prompt as a first turn or as a column of its own; the turn wins.
    has_system = messages[:1] and messages[0].role == "system"
    return _with_tools(columns, messages if has_system else [*system_turn(columns), *messages])


def _with_tools(columns: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Insert the row's tools after its system turn."""
    try:
        lines = tools_to_json_lines(columns.get("tools"))
    except ValueError as error:
        raise RowError("tools", str(error), TOOLS_FORMAT) from error
    head = 1 if messages[0].role == "system" else 0
    tools = [Message("tools", checked_text(lines, "tools"))] if lines else []
    return [*messages[:head], *tools, *messages[head:]]


CONVERSATION_LAYOUTS: tuple[Layout[list[Message]], ...] = (
    # nullable: in a data set with a tools column, rows without tools have null there.
    Layout("messages with tools", ("messages", "tools"), _parse_messages, nullable=("tools",)),
    Layout("messages", ("messages",), _parse_messages),
    Layout("ShareGPT with tools", ("conversations", "tools"), _parse_sharegpt, nullable=("tools",)),
    Layout("ShareGPT", ("conversations",), _parse_sharegpt),
    Layout("Alpaca", ("instruction", "output"), _parse_alpaca),
    Layout("Natural Instructions", ("definition", "inputs", "targets"), _parse_natural_instructions),
    Layout("T0 tasks", ("task", "prompt", "completion"), _parse_t0_tasks),
    Layout("prompt/completion", ("prompt", "completion"), _prompt_reply_parser("prompt", "completion")),
    Layout("prompt/response", ("prompt", "response"), _prompt_reply_parser("prompt", "response")),
    Layout("question/rationale/answer", ("question", "rationale", "answer"), _parse_rationale),
    Layout("question/answer", ("question", "answer"), _prompt_reply_parser("question", "answer")),
    Layout("inputs/targets", ("inputs", "targets"), _prompt_reply_parser("inputs", "targets")),
)
"""In order of detection: the first layout whose required columns are all present."""


def _parse_document(columns: Mapping[str, Any]) -> list[Message]:
    return [DOCUMENT_START, Message("assistant", text_field(columns, "text"))]


DOCUMENT = Layout("text", ("text",), _parse_document)
"""Plain text, where the stage accepts it."""


def detect_layout(
    names: Iterable[str],
    *,
    columns: Mapping[str, str] | None = None,
    where: str = "data.source",
    layouts: Sequence[Layout[list[Message]]] = CONVERSATION_LAYOUTS,
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
    repair = "map your columns: 'data.columns={instruction: QUESTION_COLUMN, output: ANSWER_COLUMN}'"
    names = list(names)
    if layouts[0] is DOCUMENT:
        repair = "map the text column: 'data.columns={text: YOUR_COLUMN}'"
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
    """Return the first of these layouts that fits; ``repair`` goes into the error if none does.

    Raises:
        UserError: a mapped column does not exist, or no layout fits.
    """
    for ours, theirs in (columns or {}).items():
        if theirs not in names:
            actual = f"'{ours}' is mapped to '{theirs}', but {where} has no such column"
            hint = did_you_mean(theirs, names)
            if ours in names:
                hint = f"the layout's name is on the left: 'data.columns={{{theirs}: {ours}}}'"
            raise UserError(Problem("data.columns", actual, f"one of {', '.join(names)}", hint))
    # A mapped column counts under its new name only.
    known = {*(name for name in names if name not in (columns or {}).values()), *(columns or {})}
    for layout in layouts:
        if known.issuperset(layout.required):
            return layout
    expected = "; ".join("+".join(layout.required) for layout in layouts)
    raise UserError(Problem(where, f"no known layout has columns {', '.join(names)}", expected, repair))


def parse_rows(
    rows: Iterable[SourceRow], layout: Layout[Parsed], columns: Mapping[str, str] | None
) -> list[Parsed]:
    """Parse each row by a layout.

    Raises:
        UserError: some rows do not fit the layout; the first few are listed with file, line and field.
    """
    parsed, problems = [], []
    for row in rows:
        try:
            parsed.append(parse_row(row, layout, columns))
        except RowError as error:
            # Collected and not raised at once: the user sees several of the rows to repair.
            problems.append(Problem(row.location, f"field '{error.field}': {error.actual}", error.expected))
    if problems:
        raise UserError(first_problems(problems, len(parsed) + len(problems)))
    return parsed


def parse_row(row: SourceRow, layout: Layout[Parsed], columns: Mapping[str, str] | None) -> Parsed:
    """Parse a row by a layout.

    Raises:
        RowError: a required column is missing or null, or a field does not fit.
    """
    values = {**row.columns, **{ours: row.columns.get(theirs) for ours, theirs in (columns or {}).items()}}
    # Null counts as missing: formats with a fixed schema (Parquet) fill absent values with it.
    for name in layout.required:
        if values.get(name) is None and name not in layout.nullable:
            raise RowError(name, "missing or null", f"layout {layout.name}: {'+'.join(layout.required)}")
    return layout.parse(values)


def first_problems(problems: list[Problem], num_rows: int) -> list[Problem]:
    """Return the first few of many rows' problems, and one that counts the rest."""
    num_more = len(problems) - MAX_REPORTED
    if num_more <= 0:
        return problems
    rest = Problem(
        f"and {num_more} more rows",
        f"{len(problems)} of {num_rows} rows do not fit",
        "one layout for all rows",
    )
    return [*problems[:MAX_REPORTED], rest]


def text_field(columns: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    """Return a column's text, "" for a missing optional one; raises RowError."""
    value = columns.get(name)
    if value is None and optional:
        return ""
    return checked_text(value, name)


def checked_text(value: Any, field: str) -> str:
    """Return the value if it is valid text; raises RowError otherwise."""
    if not isinstance(value, str):
        raise RowError(field, f"found {short_repr(value)}", "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # A lone surrogate: JSON can write one (\ud83d), UTF-8 and tokenizers cannot.
        actual = f"an unpaired surrogate ({value[error.start]!r}) at position {error.start + 1}"
        raise RowError(field, actual, "valid Unicode") from error
    return value


def system_turn(columns: Mapping[str, Any]) -> list[Message]:
    """Return a row's system turn, or [] if its column is empty or missing."""
    text = text_field(columns, "system", optional=True)
    return [Message("system", text)] if text else []


def turns_field(columns: Mapping[str, Any], name: str, role_key: str, text_key: str) -> list[Message]:
    """Parse a column that holds a list of turns; raises RowError."""
    turns = columns[name]
    if not isinstance(turns, list) or not turns:
        raise RowError(name, f"found {short_repr(turns)}", f"a list of turns with {role_key} and {text_key}")
    return [_parse_turn(turn, f"{name}[{index}]", role_key, text_key) for index, turn in enumerate(turns)]


def _parse_turn(turn: Any, field: str, role_key: str, text_key: str) -> Message:
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        raise RowError(field, f"found {short_repr(turn)}", f"an object with {role_key} and {text_key}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{field}.{role_key}", f"found {short_repr(role)}", f"one of {', '.join(ROLES)}")
    text = turn[text_key]
    # Ignored, the reply would be trained without its calls. Empty and null: a fixed schema (Parquet).
    if turn.get("tool_calls"):
        expected = "none: a turn with role function_call for each call, and observation for its result"
        raise RowError(f"{field}.tool_calls", f"found {short_repr(turn['tool_calls'])}", expected)
    if role == "function_call":
        try:
            calls = checked_text(calls_to_json_lines(text), f"{field}.{text_key}")
        except ValueError as error:
            raise RowError(f"{field}.{text_key}", str(error), CALL_FORMAT) from error
        return Message(ROLES[role], "", trained=_parse_train_flag(turn, field), tool_calls=calls)
    text = checked_text(text, f"{field}.{text_key}")
    return Message(ROLES[role], text, trained=_parse_train_flag(turn, field))


def _parse_train_flag(turn: Mapping[str, Any], field: str) -> bool:
    """Return a turn's train flag: ``trained`` or axolotl's ``train`` (true, false), or OpenAI's ``weight``.

    Only replies use the flag.
    """
    for name in TRAIN_FLAGS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(
                f"{field}.{name}", f"found {short_repr(value)}", "true or 1 (train on it), false or 0"
            )
        if not value:
            return False
    return True


def short_repr(value: Any) -> str:
    """Return a value's repr for messages, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
