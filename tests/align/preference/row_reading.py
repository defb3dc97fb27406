"""Read a row of any stage, and show what it means in one line per message."""

from typing import Any

from align.preference.rows.layouts import LABELED, RANKINGS, PreferenceRow
from align.rl.prompt_rows import PROMPT_LAYOUTS
from data_templates.segments import Message
from finetune.data.columns import UnusedColumns
from finetune.data.layouts import CONVERSATION_LAYOUTS, Layout, match_layout
from finetune.data.readers import SourceRow
from finetune.data.rows import RowParser

LAYOUTS: dict[str, Any] = {
    "sft": CONVERSATION_LAYOUTS,
    "pairs": RANKINGS,
    "labels": LABELED,
    "prompts": PROMPT_LAYOUTS,
}
Case = tuple[str, dict[str, Any], list[str] | str]


def shown(message: Message) -> str:
    """Return a message in one line: role, (thought), text, context, calls, a mark if it is not trained."""
    thought = f"({message.reasoning}) " if message.reasoning else ""
    context = f" | {message.context}" if message.context else ""
    calls = f" -> {message.tool_calls}" if message.tool_calls else ""
    return (
        f"{message.role}: {thought}{message.content}{context}{calls}{' [untrained]' * (not message.trained)}"
    )


def read(stage: str, row: dict[str, Any]) -> tuple[list[str], UnusedColumns]:
    """Return a row's messages (completions after their prompt) and what was not used; raises RowError."""
    layout: Layout[Any] = match_layout(list(row), LAYOUTS[stage], columns=None, where="rows", repair="")
    parser: RowParser[Any] = RowParser(layout, None)
    parsed = parser.parse(SourceRow(row, "file:1"))
    if isinstance(parsed, PreferenceRow):
        replies = [completion.reply for completion in parsed.completions]
        parsed = [*parsed.completions[0].prompt, *(reply for reply in replies if reply is not None)]
    return [shown(message) for message in parsed], parser.unused


def turn(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    """Return a turn; without content it has none."""
    return {"role": role, **({} if content is None else {"content": content}), **more}


def chat(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a row with these turns."""
    return {"messages": list(turns), **more}


def call(name: str = "clock", arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    """Return a call as OpenAI writes it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


Q, A = turn("user", "q"), turn("assistant", "a")
CLOCK = '{"name": "clock", "arguments": {}}'
CLOCK_AT = '{"name": "clock", "arguments": {"town": "Oslo"}}'
TOOL = '{"type": "function", "function": {"name": "clock"}}'
PLAIN = ["user: q", "assistant: a"]
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
PAIR_SHOWN = [*PLAIN, "assistant: b"]
