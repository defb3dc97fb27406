"""Conversation: the messages of one row, its location and its source; filtering of unusable rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from data_templates._segments import DOCUMENT_START, REPLIES, Message
from finetune.data.report import DataReport

Words = tuple[tuple[str, str, str], ...]
"""Roles, texts and contexts of a conversation: equal keys mean duplicates."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row's messages, its location (``file:line``), the index of its source, and its rating."""

    messages: list[Message]
    where: str
    source: int = 0
    score: float = 0.0

    @property
    def document(self) -> bool:
        """True if this is a plain text and not a conversation."""
        return self.messages[0] == DOCUMENT_START

    @property
    def words(self) -> Words:
        """Return the key by which duplicates are found: roles, texts and contexts."""
        return tuple((turn.role, turn.content, turn.context) for turn in self.messages)


def usable(rows: Iterable[Conversation], report: DataReport) -> list[Conversation]:
    """Drop conversations with an empty turn or no reply, and strip a final question that has no reply."""
    kept = []
    for row in rows:
        # An unanswered last question has nothing to train on; the turns before it may have.
        asks = row.messages[-1].role in ("user", "observation")
        turns = row.messages[:-1] if asks else row.messages
        # DOCUMENT_START is empty on purpose: it is the prompt of a plain text.
        if any(not turn.content.strip() and turn != DOCUMENT_START for turn in turns):
            report.count("dropped: empty turn", row.where)
        elif not any(turn.role in REPLIES for turn in turns):
            report.count("dropped: no assistant reply", row.where)
        else:
            kept.append(replace(row, messages=turns))
    return kept


def wishing(messages: Sequence[Message], wish: str) -> Sequence[Message]:
    """Return a conversation with a control suffix (Chain of Hindsight) appended to its last user turn."""
    if not wish or messages[-1].role != "user":
        return messages
    last = messages[-1]
    return [*messages[:-1], replace(last, content=f"{last.content}\n\n{wish}")]
