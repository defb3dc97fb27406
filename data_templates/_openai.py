"""Messages in OpenAI's form, as the chat templates of tokenizers take them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_templates.segments import Message, TemplateError, with_context


@dataclass(frozen=True, slots=True)
class Form:
    """What a chat template expects where templates differ.

    ``reasoning``: the thought is a field of the message, ``inline`` in its text, or ``insert``: the template
    leaves thoughts out, because the model generates them after the prompt; None: it knows no thoughts.
    ``null_content``: a reply of calls only has content null. ``text_arguments``: arguments are JSON text.
    ``named_ids``: a call's id has the function's name.
    """

    reasoning: Literal["field", "inline", "insert"] | None = "field"
    null_content: bool = False
    text_arguments: bool = False
    named_ids: bool = False


def write_thought(thought: str) -> str:
    """Return a thought in tags, as it precedes a reply's text."""
    thought = thought.strip("\n")
    return f"<think>\n{thought}\n</think>\n\n"


def to_openai(
    messages: Sequence[Message], form: Form
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return the turns as ``{role, content, ...}``, and the tools (None if there are none).

    Raises:
        TemplateError: tools or calls are not one JSON object per line.
    """
    turns: list[dict[str, Any]] = []
    tools = None
    results: list[dict[str, Any]] = []
    num_calls = 0
    for message in messages:
        if message.role == "tools":
            tools = [_parse_line(line, "tool") for line in message.content.split("\n")]
        elif message.role == "observation":
            # One result for each call, in their order.
            reference = results.pop(0) if results else {}
            turns.append({"role": "tool", "content": with_context(message), **reference})
        elif message.role == "assistant":
            turn = _reply_turn(message, form, num_calls)
            results = [_call_reference(call) for call in turn.get("tool_calls", ())]
            num_calls += len(results)
            turns.append(turn)
        else:
            turns.append({"role": message.role, "content": with_context(message)})
    return turns, tools


def _reply_turn(message: Message, form: Form, num_calls: int) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": with_context(message)}
    if message.reasoning and form.reasoning == "inline":
        turn["content"] = write_thought(message.reasoning) + turn["content"]
    elif message.reasoning and form.reasoning == "field":
        # Templates read one of the three.
        turn |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), message.reasoning)
    if message.tool_calls:
        lines = enumerate(message.tool_calls.split("\n"), num_calls)
        turn["tool_calls"] = [_tool_call(line, number, form) for number, line in lines]
        if form.null_content and not turn["content"]:
            turn["content"] = None
    return turn


def _tool_call(line: str, number: int, form: Form) -> dict[str, Any]:
    call = _parse_line(line, "tool call")
    arguments = call["arguments"]
    # Nine letters and digits are what Mistral's templates demand of an id; Kimi's write the name in it.
    digest = hashlib.sha256(f"{number} {line}".encode()).hexdigest()[:9]
    if form.text_arguments:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"functions.{call['name']}:{number}" if form.named_ids else digest,
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }


def _call_reference(call: dict[str, Any]) -> dict[str, Any]:
    return {"tool_call_id": call["id"], "name": call["function"]["name"]}


def _parse_line(line: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise TemplateError(f"a {what} is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, dict) or (what == "tool call" and not {"name", "arguments"} <= value.keys()):
        raise TemplateError(f"a {what} is {line[:40]!r}; expected an object with its name")
    return value
