"""``template: model``: the tokenizer's own chat template (Jinja), as labeled segments.

The text is exactly what ``apply_chat_template`` returns, so that training, chat and every server with the
same template agree. A reply begins at the end of the generation prompt for its turn, and ends with the
special token that the template writes after it.
"""

import re
from collections.abc import Callable, Sequence

from data_templates._markers import Markers
from data_templates._segments import Message, Segment, Template, TemplateError, markup, with_context

ChatRenderer = Callable[[list[dict[str, str]], bool], str]
"""Renders ``[{role, content}]`` as text; the flag is ``add_generation_prompt``."""

PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
SHORTEST_MARKER = 3
"""Minimum number of characters of a marker: a lone colon or bracket begins no turn."""


def bind(chat: ChatRenderer, *, special_tokens: Sequence[str], added_tokens: Sequence[str] = ()) -> Template:
    """Return the template of a tokenizer.

    Args:
        chat: the tokenizer's chat template.
        special_tokens: the first of them after a reply ends the turn, and carries loss.
        added_tokens: the tokenizer's other added tokens (``<think>``), which may occur in the data.
    """
    stop = _stop(chat, Markers.of(special_tokens).pattern)
    # A template without an end token may begin the next turn with a special token; that one ends no reply.
    ends = Markers.of(special_tokens if stop else ()).pattern
    complete: set[tuple[str, ...]] = set()

    def render(messages: Sequence[Message]) -> list[Segment]:
        # Whether a template drops a turn depends on the roles only, so each sequence of roles is tried once.
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
        # Searched up to the next reply only: a later turn's end token is not this one's.
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
    """Return the start of the assistant's turn: the end of its generation prompt."""
    # A template may render a turn differently once others follow it; then the prompt is not a prefix.
    prompt = chat(before, True)
    if not text.startswith(prompt):
        raise TemplateError(
            "the tokenizer's chat template changes earlier turns (the generation prompt of turn "
            f"{len(before) + 1} is not a prefix of the conversation), so training and generation would "
            "differ; use 'chatml' or another listed template"
        )
    return len(prompt)


def _closed(text: str, turns: list[dict[str, str]], chat: ChatRenderer) -> int:
    """Return the end of a turn without an end token: the end of the conversation up to it."""
    beginning = chat(turns, False)
    if not text.startswith(beginning):
        raise TemplateError(
            f"the tokenizer's chat template ends turn {len(turns)} without a special token and not as it "
            "ends a last turn, so the end of the reply is unknown; use 'chatml' or another listed template"
        )
    return len(beginning)


def _check_complete(messages: Sequence[Message], chat: ChatRenderer) -> None:
    """Raise TemplateError if the template drops a turn (often the system turn), tested with placeholders."""
    text = _with_placeholders(messages, chat)
    there = [int(match[1]) for match in PLACEHOLDER.finditer(text)]
    missing = [index for index in range(len(messages)) if index not in there]
    if missing:
        role = messages[missing[0]].role
        raise TemplateError(
            f"the tokenizer's chat template drops turn {missing[0] + 1} ({role}); use another template, or "
            "remove that turn from the data"
        )


def _with_placeholders(messages: Sequence[Message], chat: ChatRenderer) -> str:
    # Private use characters: no template contains, changes or strips them.
    blanks = [
        {"role": message.role, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)
    ]
    return chat(blanks, messages[-1].role == "user")


def _stop(chat: ChatRenderer, special: re.Pattern[str]) -> tuple[str, ...]:
    """Return the special token with which this template ends a reply, if any."""
    exchange = [Message("user", "a"), Message("assistant", "b")]
    # With a system turn too, for templates that reject a conversation without one.
    for messages in (exchange, [Message("system", "c"), *exchange]):
        try:
            segments = _render(messages, chat, special)
        except TemplateError:
            continue  # reported for each row when it is rendered
        return tuple(segment.text for segment in segments if segment.trained and segment.kind == "markup")
    return ()


def _markers(chat: ChatRenderer, whole: re.Pattern[str]) -> tuple[str, ...]:
    """Return the plain text around contents that begins or ends turns: ``### Human:``, ``[/INST]``."""
    # Special tokens are escaped anyway, and a word such as ChatML's ``user`` has no meaning without them.
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
    """Return the first (0) or last (-1) line of a text."""
    lines = text.strip().splitlines()
    return lines[place].strip() if lines else ""
