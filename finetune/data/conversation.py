"""Conversation: the messages of one row, its location and its source; filtering of unusable rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from data_templates.segments import DOCUMENT_START, REPLY_ROLES, Message
from finetune.data.report import DataReport

if TYPE_CHECKING:
    from finetune.data.tokens import Encoder

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
    """Return a conversation's turns up to its last reply; the report counts what has none.

    None, counted in the report, if a turn is empty or there is no reply.
    """
    # An unanswered last question has nothing to train on; the turns before it may have.
    end = max((number for number, turn in enumerate(messages, 1) if turn.role in REPLY_ROLES), default=0)
    turns, unanswered = messages[:end], messages[end:]
    # DOCUMENT_START is empty on purpose: it is the prompt of a plain text.
    if any(turn.is_empty and turn != DOCUMENT_START for turn in turns):
        report.count("dropped: empty turn", location)
        return None
    if not turns:
        report.count("dropped: no assistant reply", location)
        return None
    if not all(turn.is_empty for turn in unanswered):
        report.count("end with a turn that has no reply (not used)", location)
    return turns


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
    text = encoder.strip_special_tokens("".join(segment.text for segment in reply_segments))
    return [*messages[:end], replace(messages[end], content=text.strip(), reasoning="", tool_calls="")]
