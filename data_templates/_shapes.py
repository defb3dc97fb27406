"""What a tokenizer's chat template does with turns of given roles and parts: tried with placeholders."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from data_templates._openai import Form
from data_templates.segments import Message, Role, TemplateError

OWN = "the tokenizer's chat template"
PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
"""Private use characters: no template contains, changes or strips them."""
OPENED_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>\s*\Z")
"""The end of a generation prompt that opens a thought."""
EMPTY_THOUGHT = re.compile(r"(<think>)\s*(</think>\s*)")
QUESTION = Message("user", "a")
EXCHANGE = (QUESTION, Message("assistant", "b"))
CALL = (QUESTION, Message("assistant", "", tool_calls='{"name": "a", "arguments": {"a": 1}}'))
CALL_FORMS = tuple(
    Form(null_content=null, text_arguments=text, named_ids=named)
    for named in (False, True)
    for text in (False, True)
    for null in (False, True)
)
"""The forms of a reply with calls, in the order in which they are tried."""

Part = Literal["text", "thought", "tool call", "tool"]
"""What a placeholder stands for."""


class RenderForm(Protocol):
    """Renders a conversation, given in a form, with or without the generation prompt after it."""

    def __call__(self, messages: Sequence[Message], opened: bool, *, form: Form) -> str: ...


class LeftOutError(TemplateError):
    """The template leaves out a part of a turn."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a template does with turns of these roles and parts, whatever their text.

    ``ending``: the text from the first special token after the last reply's text. ``num_left_out``: thoughts
    and texts of earlier replies that the template does not repeat.
    """

    ending: str
    num_left_out: int


def find_form(render: RenderForm, *, knows_thoughts: bool) -> Form:
    """Return the form in which a template takes calls and thoughts, found by rendering both."""
    form = next((form for form in CALL_FORMS if not _missing_parts(render, CALL, form)), CALL_FORMS[0])
    return replace(form, reasoning=_find_reasoning(render, knows_thoughts))


def _find_reasoning(render: RenderForm, knows_thoughts: bool) -> Literal["field", "inline", "insert"] | None:
    turns = (QUESTION, replace(EXCHANGE[1], reasoning="c"))
    if not _missing_parts(render, turns, Form(reasoning="field")):
        return "field"
    inline = Form(reasoning="inline")
    missing = _missing_parts(render, turns, inline)
    # After an empty thought the text holds no second one.
    writes_empty = bool(EMPTY_THOUGHT.search(_try_render(render, EXCHANGE, Form())))
    reads_text = not missing and not EMPTY_THOUGHT.search(_try_render(render, turns, inline))
    prompt = _try_render(render, EXCHANGE[:1], Form(), opened=True)
    if reads_text and not OPENED_THOUGHT.search(prompt):
        return "inline" if knows_thoughts or writes_empty else None
    # A template that takes the thought out of the text knows where the model writes it.
    knows_place = OPENED_THOUGHT.search(prompt) or writes_empty or missing == {"thought"}
    return "insert" if knows_place else None


def _missing_parts(render: RenderForm, turns: Sequence[Message], form: Form) -> set[Part]:
    """Return the parts that the template leaves out of a conversation in this form."""
    probe, parts = with_placeholders(turns)
    text = _try_render(render, probe, form)
    present = {int(match[1]) for match in PLACEHOLDER.finditer(text)}
    return {part for number, (_, part) in enumerate(parts) if number not in present}


def _try_render(render: RenderForm, turns: Sequence[Message], form: Form, *, opened: bool = False) -> str:
    """Return a rendering, with a system turn if the template demands one, "" if it rejects both."""
    for messages in (turns, [Message("system", "c"), *turns]):
        try:
            return render(messages, opened, form=form)
        except TemplateError:
            continue
    return ""


def find_shape(render: RenderForm, turns: Sequence[Message], form: Form, special: re.Pattern[str]) -> Shape:
    """Render a conversation of this shape with placeholders.

    Args:
        render: the template.
        turns: the conversation.
        form: the form that the template takes.
        special: matches a special token.

    Raises:
        LeftOutError: the template drops a turn or a part of it.
        TemplateError: the template rejects the conversation.
    """
    probe, parts = with_placeholders(turns)
    ends_with_reply = turns[-1].role == "assistant"
    text = render(probe, not ends_with_reply, form=form)
    matches = list(PLACEHOLDER.finditer(text))
    present = {int(match[1]) for match in matches}
    written_turns = {parts[number][0] for number in present}
    num_left_out = 0
    for number, (index, part) in enumerate(parts):
        is_earlier = turns[index].role == "assistant" and index < len(turns) - 1
        if number in present:
            continue
        if is_earlier and part in ("text", "thought") and index in written_turns:
            num_left_out += 1  # the template does not repeat it in later prompts
        elif part != "thought" or form.reasoning != "insert":
            raise LeftOutError(describe_loss(index, turns[index].role, part))
    tail = text[matches[-1].end() :] if matches and ends_with_reply else ""
    match = special.search(tail)
    return Shape(tail[match.start() :] if match else "", num_left_out)


def describe_loss(index: int, role: Role, part: Part) -> str:
    """Return the message about a part of a turn that the template leaves out, with a repair."""
    repairs: dict[Part, str] = {
        "thought": "data.reasoning=strip removes the thoughts",
        "tool call": "data.template=toolcall writes tool calls",
        "tool": "data.template=toolcall writes tools",
        "text": "use another template, or remove that turn from the data",
    }
    what = "" if part == "text" else f"the {part} of "
    return f"{OWN} drops {what}turn {index + 1} ({role}); {repairs[part]}"


def with_placeholders(messages: Sequence[Message]) -> tuple[list[Message], list[tuple[int, Part]]]:
    r"""Return the conversation with a placeholder for each text, and the turn and part of each placeholder.

    Placeholder n is the text ``\ue000n\ue001``.
    """
    parts: list[tuple[int, Part]] = []

    def new(index: int, part: Part) -> str:
        parts.append((index, part))
        return f"\ue000{len(parts) - 1}\ue001"

    turns = []
    for index, message in enumerate(messages):
        if message.role == "tools":
            turns.append(replace(message, content=_tool(new(index, "tool"))))
            continue
        reasoning = new(index, "thought") if message.reasoning else ""
        # A reply of calls only has no text, and templates treat that differently.
        content = "" if message.tool_calls and not message.content.strip() else new(index, "text")
        calls = [_call(new, index) for _ in filter(None, message.tool_calls.split("\n"))]
        turns.append(Message(message.role, content, reasoning=reasoning, tool_calls="\n".join(calls)))
    return turns, parts


def _call(new: Callable[[int, Part], str], index: int) -> str:
    return json.dumps({"name": new(index, "tool call"), "arguments": {"a": new(index, "tool call")}})


def _tool(name: str) -> str:
    properties = {"a": {"type": "string", "description": "a"}}
    parameters = {"type": "object", "properties": properties, "required": ["a"]}
    return json.dumps(
        {"type": "function", "function": {"name": name, "description": "a", "parameters": parameters}}
    )
