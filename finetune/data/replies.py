"""Replies as a template renders them: their text, and whether all of them carry loss."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

from data_templates._segments import REPLIES, Message
from finetune.data.tokens import Encoder


def worded(messages: Sequence[Message], encoder: Encoder) -> list[Message]:
    """Return a conversation up to its last reply, with that reply's text as the template renders it.

    This is the text the model is trained on: a tool call has its tags, injected markers are escaped.
    """
    end = max(index for index, turn in enumerate(messages) if turn.role in REPLIES)
    segments, _ = encoder.segments(messages[: end + 1])
    pairs = enumerate(pairwise(segments), 1)
    start = max(index for index, (before, piece) in pairs if piece.reply and not before.reply)
    said = (piece for piece in segments[start:] if piece.reply and piece.kind != "eos")
    # Without end tokens, as a generated reply is decoded without them.
    text = "".join(piece.text for piece in said if piece.text not in encoder.template.stop)
    return [*messages[:end], replace(messages[end], content=text.strip())]


def passed_over(messages: Sequence[Message], trained: Sequence[bool]) -> bool:
    """Return True if a template leaves replies without loss that the data marks for training.

    Args:
        messages: a conversation.
        loss_mask: its loss mask, of length T.
    """
    # Each reply is one run of trained tokens, as the prompt between two replies carries no loss.
    meant = sum(turn.trained for turn in messages if turn.role in REPLIES)
    # With a single reply the whole mask would be empty, and the row is dropped and counted elsewhere.
    return meant > 1 and meant > sum(learnt for learnt, _ in groupby(trained))
