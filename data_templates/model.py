"""``template: model``: the chat template that the tokenizer itself carries (Jinja), as labelled segments.

The text is exactly what the tokenizer writes, so that training, chat and every server that uses the same
template agree. A reply is what stands between two places that the template itself names: the end of the
prompt that it writes for that turn, and the special token that it ends the turn with.
"""

import re
from collections.abc import Callable, Sequence

from data_templates._markers import Markers
from data_templates._segments import Message, Segment, Template, TemplateError, markup, with_context

ChatRenderer = Callable[[list[dict[str, str]], bool], str]
"""Writes ``[{role, content}]`` as text; the flag asks for an opened assistant turn at the end."""

PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
SHORTEST_MARKER = 3
"""Characters of a marker at least: a lone colon or bracket begins no turn."""


def bind(chat: ChatRenderer, *, special_tokens: Sequence[str], added_tokens: Sequence[str] = ()) -> Template:
    """Return the template that a tokenizer carries.

    Args:
        chat: the tokenizer's own rendering of messages.
        special_tokens: the first of them behind a reply ends the turn, and carries loss.
        added_tokens: the tokenizer's further whole tokens (``<think>``), which data may write.
    """
    stop = _stop(chat, Markers.of(special_tokens).pattern)
    # A template without an end token may still begin the next turn with a special one, which ends no reply.
    ends = Markers.of(special_tokens if stop else ()).pattern
    complete: set[tuple[str, ...]] = set()

    def render(messages: Sequence[Message]) -> list[Segment]:
        roles = tuple(message.role for message in messages)
        if roles not in complete:
            _check_complete(messages, chat)
            complete.add(roles)
        return _render(messages, chat, ends)

    whole = Markers.of([*special_tokens, *added_tokens]).pattern
    return Template(render, markers=_markers(chat, whole), stop=stop)


def _render(messages: Sequence[Message], chat: ChatRenderer, ends: re.Pattern[str]) -> list[Segment]:
    turns = [{"role": message.role, "content": with_context(message)} for message in messages]
    text = chat(turns, messages[-1].role == "user")
    replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
    opened = [_opened(text, turns[:index], chat) for index in replies]
    segments: list[Segment] = []
    start = 0
    limits = [*opened, len(text)][1:]
    for index, begin, limit in zip(replies, opened, limits, strict=True):
        trained = messages[index].trained
        end = ends.search(text, begin, limit)
        stop = end.start() if end else _closed(text, turns[: index + 1], chat)
        last = (
            Segment("markup", end[0], trained, reply=True) if end else Segment("eos", "", trained, reply=True)
        )
        segments += [
            markup(text[start:begin]),
            Segment("content", text[begin:stop], trained, reply=True),
            last,
        ]
        start = end.end() if end else stop
    return [*segments, markup(text[start:])] if text[start:] else segments


def _opened(text: str, before: list[dict[str, str]], chat: ChatRenderer) -> int:
    """Return where the assistant's turn begins: behind what the template writes as its prompt."""
    prompt = chat(before, True)
    if not text.startswith(prompt):
        raise TemplateError(
            "the model's own chat template writes a conversation otherwise than its beginning (the prompt of "
            f"turn {len(before) + 1} is no prefix of the whole), so training would differ from chatting; "
            "use 'chatml' or another template of the list"
        )
    return len(prompt)


def _closed(text: str, turns: list[dict[str, str]], chat: ChatRenderer) -> int:
    """Return where a turn without an end token ends: where the conversation up to it does."""
    beginning = chat(turns, False)
    if not text.startswith(beginning):
        raise TemplateError(
            f"the model's own chat template ends turn {len(turns)} with no special token and otherwise than "
            "a conversation's last turn, so nothing tells where the reply ends; use 'chatml' or another one"
        )
    return len(beginning)


def _check_complete(messages: Sequence[Message], chat: ChatRenderer) -> None:
    """Raise TemplateError if the template leaves out a turn, often the system's (tried with placeholders)."""
    text = _with_placeholders(messages, chat)
    there = [int(match[1]) for match in PLACEHOLDER.finditer(text)]
    missing = [index for index in range(len(messages)) if index not in there]
    if missing:
        role = messages[missing[0]].role
        raise TemplateError(
            f"the model's own chat template leaves turn {missing[0] + 1} ({role}) out of the text; use "
            "another template, or leave that turn out of the data"
        )


def _with_placeholders(messages: Sequence[Message], chat: ChatRenderer) -> str:
    blanks = [
        {"role": message.role, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)
    ]
    return chat(blanks, messages[-1].role == "user")


def _stop(chat: ChatRenderer, special: re.Pattern[str]) -> tuple[str, ...]:
    """Return the special token that this template ends a reply with, if it writes one."""
    exchange = [Message("user", "a"), Message("assistant", "b")]
    for messages in (exchange, [Message("system", "c"), *exchange]):
        try:
            segments = _render(messages, chat, special)
        except TemplateError:
            continue  # each row will tell
        return tuple(segment.text for segment in segments if segment.trained and segment.kind == "markup")
    return ()


def _markers(chat: ChatRenderer, whole: re.Pattern[str]) -> tuple[str, ...]:
    """Return the plain text beside contents that begins or ends turns: ``### Human:``, ``[/INST]``.

    Special tokens are written apart in any case; a word such as ChatML's ``user`` means nothing without them.
    """
    turns = [Message("user", ""), Message("assistant", ""), Message("user", "")]
    found: list[str] = []
    for messages in (turns, [Message("system", ""), *turns]):
        try:
            text = _with_placeholders(messages, chat)
        except TemplateError:
            continue
        pieces = PLACEHOLDER.split(text)[::2]
        found += [_line(whole.split(piece)[-1], -1) for piece in pieces[:-1]]
        found += [_line(whole.split(piece)[0], 0) for piece in pieces[1:]]
    marked = [line for line in found if len(line) >= SHORTEST_MARKER and not line.isalnum()]
    return tuple(dict.fromkeys(marked))


def _line(text: str, place: int) -> str:
    """Return the first (0) or last (-1) line of what the template writes beside a content."""
    lines = text.strip().splitlines()
    return lines[place].strip() if lines else ""
