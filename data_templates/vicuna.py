"""Vicuna v1.1's chat format: USER and ASSISTANT; multi-turn.

The reference is ``vicuna_v1.1`` in ``conversation.py`` of lm-sys/FastChat.
"""

from collections.abc import Sequence
from functools import partial

from data_templates.segments import (
    BOS,
    Message,
    Segment,
    Template,
    markup,
    parse_text,
    reply_segments,
    split_system,
    with_context,
)

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render ``system USER: ... ASSISTANT: ...</s>USER: ... ASSISTANT:``."""
    system, turns = split_system(messages, VICUNA_SYSTEM)
    # A system text of the data is content, so that markers in it are escaped; `is`: even if it equals ours.
    segments = [
        BOS,
        markup(VICUNA_SYSTEM) if system is VICUNA_SYSTEM else Segment("content", system),
        markup(" "),
    ]
    for message in turns:
        if message.role == "user":
            segments += [markup("USER: "), Segment("content", with_context(message)), markup(" ASSISTANT:")]
        else:
            segments += reply_segments(message, before=" ")
    return segments


TEMPLATE = Template(render, markers=("USER:", "ASSISTANT:"), parse=partial(parse_text, before=" "))
