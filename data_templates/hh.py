"""Anthropic's HH format: ``Human:`` and ``Assistant:``, each after a blank line; multi-turn.

The reference is the data of anthropics/hh-rlhf (Bai et al. 2022, arXiv 2204.05862), where a dialogue begins
with two line feeds.
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
    user_segments,
)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def render(messages: Sequence[Message]) -> list[Segment]:
    r"""Render ``\n\nHuman: ...\n\nAssistant: ...``; a system turn goes first."""
    system, turns = split_system(messages)
    segments = [BOS, Segment("content", system)] if system else [BOS]
    for message in turns:
        if message.role == "assistant":
            segments += reply_segments(message, before=" ")
        else:
            segments += [markup(f"{HUMAN} "), *user_segments(message), markup(ASSISTANT)]
    return segments


TEMPLATE = Template(render, markers=(HUMAN, ASSISTANT), parse=partial(parse_text, before=" "))
