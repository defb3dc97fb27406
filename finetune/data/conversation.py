"""Conversation: the messages of one row, its location and its source; filtering of unusable rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from data_templates.segments import DOCUMENT_START, REPLY_ROLES, Message
from finetune.data.report import DataReport

TextKey = tuple[tuple[str, str, str], ...]
"""Roles, texts and contexts of a conversation: equal keys mean duplicates."""


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
        """Return the key by which duplicates are found: roles, texts and contexts."""
        return tuple((turn.role, turn.content, turn.context) for turn in self.messages)


def filter_usable(rows: Iterable[Conversation], report: DataReport) -> list[Conversation]:
    """Drop conversations with an empty turn or no reply, and strip a final question that has no reply."""
    usable_rows = []
    for row in rows:
        # An unanswered last question has nothing to train on; the turns before it may have.
        ends_with_prompt = row.messages[-1].role in ("user", "observation")
        turns = row.messages[:-1] if ends_with_prompt else row.messages
        # DOCUMENT_START is empty on purpose: it is the prompt of a plain text.
        if any(not turn.content.strip() and turn != DOCUMENT_START for turn in turns):
            report.count("dropped: empty turn", row.location)
        elif not any(turn.role in REPLY_ROLES for turn in turns):
            report.count("dropped: no assistant reply", row.location)
        else:
            usable_rows.append(replace(row, messages=turns))
    return usable_rows


def with_control_suffix(messages: Sequence[Message], control_suffix: str) -> Sequence[Message]:
    """Return a conversation with a control suffix (Chain of Hindsight) appended to its last user turn."""
    if not control_suffix or messages[-1].role != "user":
        return messages
    last = messages[-1]
    return [*messages[:-1], replace(last, content=f"{last.content}\n\n{control_suffix}")]
