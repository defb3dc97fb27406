"""JSON of tools and tool calls in one canonical form: one object per line, as chat templates write it."""

import json
from typing import Any

TOOLS_FORMAT = 'a JSON list of tools, each with a "name" (or {"type": "function", "function": {...}})'
CALL_FORMAT = '{"name": ..., "arguments": {...}} as JSON, or a list of them'


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
