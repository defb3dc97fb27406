"""What a template makes of replies: the words that are learnt, and those that are not."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

from data_templates._segments import REPLIES, Message
from finetune.data.tokens import Encoder


def worded(messages: Sequence[Message], encoder: Encoder) -> list[Message]:
    """Return a conversation up to its last reply, that reply as the template writes it.

    This is what the model learns to say: a call stands in its tags, a forged marker is written apart.
    """
    end = max(index for index, turn in enumerate(messages) if turn.role in REPLIES)
    segments, _ = encoder.segments(messages[: end + 1])
    pairs = enumerate(pairwise(segments), 1)
    start = max(index for index, (before, piece) in pairs if piece.reply and not before.reply)
    said = (piece for piece in segments[start:] if piece.reply and piece.kind != "eos")
    text = "".join(piece.text for piece in said if piece.text not in encoder.template.stop)
    return [*messages[:end], replace(messages[end], content=text.strip())]


def passed_over(messages: Sequence[Message], trained: Sequence[bool]) -> bool:
    """Tell whether a template leaves replies without loss that the data means to be learnt.

    Args:
        messages: a conversation.
        trained: which of its tokens carry loss, of length T.
    """
    meant = sum(turn.trained for turn in messages if turn.role in REPLIES)
    return meant > 1 and meant > sum(learnt for learnt, _ in groupby(trained))
