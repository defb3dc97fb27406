"""JSON of tools and tool calls in one canonical form: one object per line, as chat templates write it."""

import json
from typing import Any

TOOLS = 'a JSON list of tools, each with a "name" (or {"type": "function", "function": {...}})'
CALL = '{"name": ..., "arguments": {...}} as JSON, or a list of them'


def tool_lines(value: Any) -> str:
    """Return a line ``{"type": "function", "function": {...}}`` per tool, "" if there is none.

    Args:
        value: a list of tools, bare or already wrapped, or its JSON; null and empty text mean none.

    Raises:
        ValueError: it is something else; the message shows the value.
    """
    if value is None or value == "":
        return ""
    tools = _parsed(value)
    if not isinstance(tools, list):
        raise ValueError(f"found {_short(tools)}")
    return "\n".join(_line(_wrapped(tool)) for tool in tools)


def call_lines(value: Any) -> str:
    """Return a line ``{"name": ..., "arguments": {...}}`` per tool call of a turn.

    Args:
        value: one call or a list of them, or its JSON.

    Raises:
        ValueError: it is something else; the message shows the value.
    """
    calls = _parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise ValueError("found no tool call")
    for call in calls:
        named = isinstance(call, dict) and isinstance(call.get("name"), str)
        if not named or not isinstance(call.get("arguments"), dict):
            raise ValueError(f"found {_short(call)}")
    return "\n".join(_line({"name": call["name"], "arguments": call["arguments"]}) for call in calls)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}): {_short(value)}") from error


def _wrapped(tool: Any) -> dict[str, Any]:
    inner = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else tool
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError(f"found {_short(tool)}")
    return {"type": "function", "function": inner}


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
