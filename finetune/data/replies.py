"""Replies as a template renders them: their text, and whether all of them carry loss."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

from data_templates.segments import REPLY_ROLES, Message
from finetune.data.tokens import Encoder


def render_reply(messages: Sequence[Message], encoder: Encoder) -> list[Message]:
    """Return a conversation up to its last reply, with that reply's text as the template renders it.

    This is the text the model is trained on: a tool call has its tags, injected markers are escaped.
    """
    end = max(index for index, turn in enumerate(messages) if turn.role in REPLY_ROLES)
    segments, _ = encoder.segments(messages[: end + 1])
    pairs = enumerate(pairwise(segments), 1)
    start = max(index for index, (previous, segment) in pairs if segment.reply and not previous.reply)
    reply_segments = (segment for segment in segments[start:] if segment.reply and segment.kind != "eos")
    # Without end tokens, as a generated reply is decoded without them.
    text = "".join(segment.text for segment in reply_segments if segment.text not in encoder.template.stop)
    return [*messages[:end], replace(messages[end], content=text.strip())]


def has_replies_without_loss(messages: Sequence[Message], loss_mask: Sequence[bool]) -> bool:
    """Return True if a template leaves replies without loss that the data marks for training.

    Args:
        messages: a conversation.
        loss_mask: its loss mask, of length T.
    """
    # Each reply is one run of trained tokens, as the prompt between two replies carries no loss.
    num_to_train = sum(turn.trained for turn in messages if turn.role in REPLY_ROLES)
    # With a single reply the whole mask would be empty, and the row is dropped and counted elsewhere.
    return num_to_train > 1 and num_to_train > sum(is_trained for is_trained, _ in groupby(loss_mask))
