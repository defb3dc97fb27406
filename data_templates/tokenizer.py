"""The chat template (Jinja) of the base's tokenizer, as labeled segments.

The text is exactly what ``apply_chat_template`` returns, so that training, chat and every server with the
same template agree. A reply begins at the end of the generation prompt for its turn, and ends with the
special token that the template writes after it.
"""

import re
from collections.abc import Callable, Sequence

from data_templates.markers import Markers
from data_templates.segments import Message, Segment, Template, TemplateError, markup, with_context

ChatTemplate = Callable[[list[dict[str, str]], bool], str]
"""Renders ``[{role, content}]`` as text; the flag is ``add_generation_prompt``."""

PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
MIN_MARKER_LENGTH = 3
"""Minimum number of characters of a marker: a lone colon or bracket begins no turn."""


def bind_chat_template(
    chat: ChatTemplate, *, special_tokens: Sequence[str], added_tokens: Sequence[str] = ()
) -> Template:
    """Return the template of a tokenizer.

    Args:
        chat: the tokenizer's chat template.
        special_tokens: the first of them after a reply ends the turn, and carries loss.
        added_tokens: the tokenizer's other added tokens (``<think>``), which may occur in the data.
    """
    stop = _stop_tokens(chat, Markers.of(special_tokens).pattern)
    # A template without an end token may begin the next turn with a special token; that one ends no reply.
    end_pattern = Markers.of(special_tokens if stop else ()).pattern
    checked_roles: set[tuple[str, ...]] = set()

    def render(messages: Sequence[Message]) -> list[Segment]:
        # Whether a template drops a turn depends on the roles only, so each sequence of roles is tried once.
        roles = tuple(message.role for message in messages)
        if roles not in checked_roles:
            _check_no_dropped_turn(messages, chat)
            checked_roles.add(roles)
        return _render_segments(messages, chat, end_pattern)

    special_pattern = Markers.of([*special_tokens, *added_tokens]).pattern
    return Template(render, markers=_turn_markers(chat, special_pattern), stop=stop)


def _render_segments(
    messages: Sequence[Message], chat: ChatTemplate, end_pattern: re.Pattern[str]
) -> list[Segment]:
    turns = [{"role": message.role, "content": with_context(message)} for message in messages]
    text = chat(turns, messages[-1].role == "user")
    replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
    reply_starts = [_reply_start(text, turns[:index], chat) for index in replies]
    segments: list[Segment] = []
    start = 0
    limits = [*reply_starts, len(text)][1:]
    for index, reply_start, limit in zip(replies, reply_starts, limits, strict=True):
        trained = messages[index].trained
        # Searched up to the next reply only: a later turn's end token is not this one's.
        end_match = end_pattern.search(text, reply_start, limit)
        reply_end = end_match.start() if end_match else _reply_end(text, turns[: index + 1], chat)
        end_segment = (
            Segment("markup", end_match[0], trained, reply=True)
            if end_match
            else Segment("eos", "", trained, reply=True)
        )
        segments += [
            markup(text[start:reply_start]),
            Segment("content", text[reply_start:reply_end], trained, reply=True),
            end_segment,
        ]
        start = end_match.end() if end_match else reply_end
    return [*segments, markup(text[start:])] if text[start:] else segments


def _reply_start(text: str, turns: list[dict[str, str]], chat: ChatTemplate) -> int:
    """Return the start of the assistant's turn: the end of its generation prompt."""
    # A template may render a turn differently once others follow it; then the prompt is not a prefix.
    prompt = chat(turns, True)
    if not text.startswith(prompt):
        raise TemplateError(
            "the tokenizer's chat template changes earlier turns (the generation prompt of turn "
            f"{len(turns) + 1} is not a prefix of the conversation), so training and generation would "
            "differ; use 'chatml' or another listed template"
        )
    return len(prompt)


def _reply_end(text: str, turns: list[dict[str, str]], chat: ChatTemplate) -> int:
    """Return the end of a turn without an end token: the end of the conversation up to it."""
    rendered = chat(turns, False)
    if not text.startswith(rendered):
        raise TemplateError(
            f"the tokenizer's chat template ends turn {len(turns)} without a special token and not as it "
            "ends a last turn, so the end of the reply is unknown; use 'chatml' or another listed template"
        )
    return len(rendered)


def _check_no_dropped_turn(messages: Sequence[Message], chat: ChatTemplate) -> None:
    """Raise TemplateError if the template drops a turn (often the system turn), tested with placeholders."""
    text = _with_placeholders(messages, chat)
    present = [int(match[1]) for match in PLACEHOLDER.finditer(text)]
    missing = [index for index in range(len(messages)) if index not in present]
    if missing:
        role = messages[missing[0]].role
        raise TemplateError(
            f"the tokenizer's chat template drops turn {missing[0] + 1} ({role}); use another template, or "
            "remove that turn from the data"
        )


def _with_placeholders(messages: Sequence[Message], chat: ChatTemplate) -> str:
    # Private use characters: no template contains, changes or strips them.
    placeholders = [
        {"role": message.role, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)
    ]
    return chat(placeholders, messages[-1].role == "user")


def _stop_tokens(chat: ChatTemplate, special_pattern: re.Pattern[str]) -> tuple[str, ...]:
    """Return the special token with which this template ends a reply, if any."""
    exchange = [Message("user", "a"), Message("assistant", "b")]
    # With a system turn too, for templates that reject a conversation without one.
    for messages in (exchange, [Message("system", "c"), *exchange]):
        try:
            segments = _render_segments(messages, chat, special_pattern)
        except TemplateError:
            continue  # reported for each row when it is rendered
        return tuple(segment.text for segment in segments if segment.trained and segment.kind == "markup")
    return ()


def _turn_markers(chat: ChatTemplate, special_pattern: re.Pattern[str]) -> tuple[str, ...]:
    """Return the plain text around contents that begins or ends turns: ``### Human:``, ``[/INST]``."""
    # Special tokens are escaped anyway, and a word such as ChatML's ``user`` has no meaning without them.
    turns = [Message("user", ""), Message("assistant", ""), Message("user", "")]
    lines: list[str] = []
    for messages in (turns, [Message("system", ""), *turns]):
        try:
            text = _with_placeholders(messages, chat)
        except TemplateError:
            continue
        pieces = PLACEHOLDER.split(text)[::2]
        lines += [_edge_line(special_pattern.split(piece)[-1], -1) for piece in pieces[:-1]]
        lines += [_edge_line(special_pattern.split(piece)[0], 0) for piece in pieces[1:]]
    # A plain word may begin a turn, but it is too common in the data to be escaped.
    markers = [line for line in lines if len(line) >= MIN_MARKER_LENGTH and not line.isalnum()]
    return tuple(dict.fromkeys(markers))


def _edge_line(text: str, edge: int) -> str:
    """Return the first (0) or last (-1) line of a text."""
    lines = text.strip().splitlines()
    return lines[edge].strip() if lines else ""
