"""``template: model``: the chat template that the tokenizer itself carries (Jinja), cut into labelled segments.

The template is rendered with a placeholder in each content's stead. What stands between placeholders is markup, what
replaces them is content, so the labels come from the places themselves and content cannot pass for markup.
"""

import re
from collections.abc import Callable, Sequence

from data_templates._segments import Message, Segment, Template, TemplateError, markup, with_context

ChatRenderer = Callable[[list[dict[str, str]], bool], str]
"""Writes ``[{role, content}]`` as text; the flag asks for an opened assistant turn at the end."""

PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")


def bind(chat: ChatRenderer, *, stop: Sequence[str]) -> Template:
    """Return the template that a tokenizer carries.

    Args:
        chat: the tokenizer's own rendering of messages.
        stop: the special tokens that may end a turn (EOS among them); the first one after a reply carries loss.
    """
    return Template(lambda messages: _render(messages, chat, stop), stop=tuple(stop))


def _render(messages: Sequence[Message], chat: ChatRenderer, stop: Sequence[str]) -> list[Segment]:
    blanks = [{"role": message.role, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)]
    text = chat(blanks, messages[-1].role == "user")
    segments: list[Segment] = []
    start = 0
    for index, message in enumerate(messages):
        place = _place(text, index)
        if message.role != "assistant":
            segments += [markup(text[start : place.start()]), Segment("content", with_context(message))]
            start = place.end()
            continue
        opened = _opened(text, blanks[:index], chat)
        tail = _next_place(text, place.end())
        end, found = _turn_end(text[place.end() : tail], stop)
        segments += [
            markup(text[start:opened]),
            Segment("markup", text[opened : place.start()], message.trained),
            Segment("content", message.content, message.trained),
            Segment("markup", text[place.end() : place.end() + end], message.trained),
            *([] if found else [Segment("eos", "", message.trained)]),
        ]
        start = place.end() + end
    segments.append(markup(text[start:]))
    return [segment for segment in segments if segment.text or segment.kind == "eos"]


def _place(text: str, index: int) -> re.Match[str]:
    for match in PLACEHOLDER.finditer(text):
        if int(match[1]) == index:
            return match
    raise TemplateError(
        f"the model's own chat template leaves turn {index + 1} out of the text; use another template, "
        "or leave that turn (often the system's) out of the data"
    )


def _next_place(text: str, start: int) -> int:
    match = PLACEHOLDER.search(text, start)
    return match.start() if match else len(text)


def _opened(text: str, before: list[dict[str, str]], chat: ChatRenderer) -> int:
    """Return where the assistant's turn begins: behind what the template writes as the prompt for that turn."""
    prompt = chat(before, True)
    if not text.startswith(prompt):
        raise TemplateError(
            "the model's own chat template writes a conversation otherwise than its beginning (the prompt of turn "
            f"{len(before) + 1} is no prefix of the whole), so training would differ from chatting; use 'chatml' "
            "or another template of the list"
        )
    return len(prompt)


def _turn_end(tail: str, stop: Sequence[str]) -> tuple[int, bool]:
    """Return where in ``tail`` (markup alone) the turn's end token ends, and whether there is one."""
    ends = [(tail.index(token), tail.index(token) + len(token)) for token in stop if token in tail]
    return (min(ends)[1], True) if ends else (0, False)
