"""A row as the project knows it: its messages and where it stands."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from data_templates._segments import DOCUMENT_START, REPLIES, Message
from finetune.data.report import DataReport

Words = tuple[tuple[str, str, str], ...]
"""Roles and texts of a conversation: two with the same are copies of each other."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row's messages, where it stands (``file:line``), its source's number, and its rating."""

    messages: list[Message]
    where: str
    source: int = 0
    score: float = 0.0

    @property
    def document(self) -> bool:
        """Tell whether this is a plain text and no conversation."""
        return self.messages[0] == DOCUMENT_START

    @property
    def words(self) -> Words:
        """Return what is said, by whom."""
        return tuple((turn.role, turn.content, turn.context) for turn in self.messages)


def usable(rows: Iterable[Conversation], report: DataReport) -> list[Conversation]:
    """Leave out conversations with an empty turn or no reply; cut a last question that has none."""
    kept = []
    for row in rows:
        asks = row.messages[-1].role in ("user", "observation")
        turns = row.messages[:-1] if asks else row.messages
        if any(not turn.content.strip() and turn != DOCUMENT_START for turn in turns):
            report.count("left out, a turn is empty", row.where)
        elif not any(turn.role in REPLIES for turn in turns):
            report.count("left out, without a reply", row.where)
        else:
            kept.append(replace(row, messages=turns))
    return kept


def wishing(messages: Sequence[Message], wish: str) -> Sequence[Message]:
    """Return a conversation with a wish behind the user's last words."""
    if not wish or messages[-1].role != "user":
        return messages
    last = messages[-1]
    return [*messages[:-1], replace(last, content=f"{last.content}\n\n{wish}")]
