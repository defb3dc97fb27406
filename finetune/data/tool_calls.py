"""Tools and tool calls of published data, as JSON in one canonical form: one object per line.

Chat templates write them in this form. ``calls_to_json_lines`` accepts the forms of OpenAI (``{"id": ...,
"type": "function", "function": {"name": ..., "arguments": "{...}"}}``) and of LLaMA-Factory (``{"name": ...,
"arguments": {...}}``).
"""

import json
from typing import Any

from finetune.data.fields import short_repr

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
        raise ValueError(f"found {short_repr(tools)}")
    return "\n".join(_to_json(_wrap_tool(tool)) for tool in tools)


def calls_to_json_lines(value: Any) -> str:
    """Return a line ``{"name": ..., "arguments": {...}}`` per tool call of a turn.

    Args:
        value: one call or a list of them, or its JSON.

    Raises:
        ValueError: it is something else; the message shows the value.
    """
    calls = call_list(value)
    if not calls:
        raise ValueError("found no tool call")
    return "\n".join(_to_json(_canonical_call(call)) for call in calls)


def call_list(value: Any) -> list[Any]:
    """Return the calls of a turn: a list, a single call, or JSON of either.

    Raises:
        ValueError: a text that is not JSON.
    """
    calls = _parse_json(value)
    return calls if isinstance(calls, list) else [calls]


def _canonical_call(call: Any) -> dict[str, Any]:
    inner = call.get("function") if isinstance(call, dict) and call.get("function") is not None else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or "arguments" not in inner:
        raise ValueError(f"found {short_repr(call)}")
    arguments = inner["arguments"]
    # OpenAI's arguments are the text that the model wrote; without arguments it may be empty.
    arguments = {} if arguments is None or arguments == "" else _parse_json(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"found {short_repr(call)}")
    return {"name": inner["name"], "arguments": arguments}


def _parse_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}): {short_repr(value)}") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or nested too deeply.
        raise ValueError(f"not JSON ({error}): {short_repr(value)}") from error


def _wrap_tool(tool: Any) -> dict[str, Any]:
    inner = tool
    if isinstance(tool, dict) and tool.get("type") == "function":
        # OpenAI's newer interface has the name beside the type.
        flat = {key: value for key, value in tool.items() if key not in ("type", "function")}
        inner = flat if tool.get("function") is None else tool["function"]
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError(f"found {short_repr(tool)}")
    if isinstance(inner.get("parameters"), str):
        # Tables cannot hold schemas of different tools in one column type, so axolotl writes them as text.
        inner = {**inner, "parameters": _parse_json(inner["parameters"])}
    return {"type": "function", "function": inner}


def _to_json(value: dict[str, Any]) -> str:
    # As the tojson filter of chat templates in transformers, which escapes no Unicode.
    return json.dumps(value, ensure_ascii=False)
