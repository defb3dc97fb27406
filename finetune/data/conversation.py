"""Conversation: the messages of one row, its location and its source; filtering of unusable rows.

Tools and tool calls are JSON in one canonical form: one object per line, as chat templates write it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from data_templates.segments import DOCUMENT_START, REPLY_ROLES, Message
from finetune.data.report import DataReport

if TYPE_CHECKING:
    from finetune.data.tokens import Encoder

TOOLS_FORMAT = 'a JSON list of tools, each with a "name" (or {"type": "function", "function": {...}})'
CALL_FORMAT = '{"name": ..., "arguments": {...}} as JSON, or a list of them'

TextKey = tuple[tuple[str, ...], ...]
"""Roles and texts of a conversation: equal keys mean duplicates."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row's messages, its location (``file:line``), the index of its source, and its rating."""

    messages: list[Message]
    location: str
    source_index: int = 0
    score: float = 0.0

    @property
    def is_document(self) -> bool:
        """True if this is a plain text and not a conversation."""
        return self.messages[0] == DOCUMENT_START

    @property
    def text_key(self) -> TextKey:
        """Return the key by which duplicates are found: the roles and texts of all turns."""
        return tuple(turn.key for turn in self.messages)


def usable_turns(messages: list[Message], location: str, report: DataReport) -> list[Message] | None:
    """Return a conversation's turns without a final question that has no reply.

    None, counted in the report, if a turn is empty or there is no reply.
    """
    # An unanswered last question has nothing to train on; the turns before it may have.
    turns = messages[:-1] if messages[-1].role in ("user", "observation") else messages
    # DOCUMENT_START is empty on purpose: it is the prompt of a plain text.
    if any(turn.is_empty and turn != DOCUMENT_START for turn in turns):
        report.count("dropped: empty turn", location)
    elif not any(turn.role in REPLY_ROLES for turn in turns):
        report.count("dropped: no assistant reply", location)
    else:
        return turns
    return None


def with_control_suffix(messages: Sequence[Message], control_suffix: str) -> Sequence[Message]:
    """Return a conversation with a control suffix (Chain of Hindsight) appended to its last user turn."""
    if not control_suffix or messages[-1].role != "user":
        return messages
    last = messages[-1]
    return [*messages[:-1], replace(last, content=f"{last.content}\n\n{control_suffix}")]


def render_reply(messages: Sequence[Message], encoder: "Encoder") -> list[Message]:
    """Return a conversation up to its last reply, with that reply's text as the template renders it.

    This is the text the model is trained on: thoughts and tool calls have their tags, injected markers are
    escaped.
    """
    end = max(index for index, turn in enumerate(messages) if turn.role in REPLY_ROLES)
    before = [replace(turn, trained=False) for turn in messages[:end]]
    segments, _ = encoder.segments([*before, messages[end]])
    pairs = enumerate(pairwise(segments), 1)
    start = max(index for index, (previous, segment) in pairs if segment.reply and not previous.reply)
    reply_segments = (segment for segment in segments[start:] if segment.reply and segment.kind != "eos")
    # Without end tokens, as a generated reply is decoded without them.
    text = "".join(segment.text for segment in reply_segments if segment.text not in encoder.template.stop)
    return [*messages[:end], replace(messages[end], content=text.strip(), reasoning="", tool_calls="")]


def tools_to_json_lines(value: Any) -> str:
    """Return a line ``{"type": "function", "function": {...}}`` per tool, "" if there is none.

    Args:
        value: a list of tools, bare or already wrapped, or its JSON; null and empty text mean none.

    Raises:
        ValueError: it is something else; the message shows the value.
    """
    if value is None or value == "":
        return ""
    tools = _parse_json(value)
    if not isinstance(tools, list):
        raise ValueError(f"found {_abbreviate(tools)}")
    return "\n".join(_to_json(_wrap_tool(tool)) for tool in tools)


def calls_to_json_lines(value: Any) -> str:
    """Return a line ``{"name": ..., "arguments": {...}}`` per tool call of a turn.

    Args:
        value: one call or a list of them, or its JSON.

    Raises:
        ValueError: it is something else; the message shows the value.
    """
    calls = _parse_json(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise ValueError("found no tool call")
    for call in calls:
        has_name = isinstance(call, dict) and isinstance(call.get("name"), str)
        if not has_name or not isinstance(call.get("arguments"), dict):
            raise ValueError(f"found {_abbreviate(call)}")
    return "\n".join(_to_json({"name": call["name"], "arguments": call["arguments"]}) for call in calls)


def _parse_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}): {_abbreviate(value)}") from error


def _wrap_tool(tool: Any) -> dict[str, Any]:
    inner = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else tool
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError(f"found {_abbreviate(tool)}")
    return {"type": "function", "function": inner}


def _to_json(value: dict[str, Any]) -> str:
    # As the tojson filter of chat templates in transformers, which escapes no Unicode.
    return json.dumps(value, ensure_ascii=False)


def _abbreviate(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
