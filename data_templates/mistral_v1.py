"""Mistral-Instruct's first chat format (7B v0.1, Mixtral-8x7B): ``[INST] question [/INST] answer``.

The system text goes before the first question. The reference is ``InstructTokenizerV1`` of
mistralai/mistral-common; ``mistral`` is the format of later models.
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


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render ``<s>[INST] question [/INST] answer</s>[INST] ...``."""
    system, turns = split_system(messages)
    segments = [BOS]
    for index, message in enumerate(turns):
        if message.role == "assistant":
            segments += reply_segments(message, before=" ")
            continue
        head = [Segment("content", system), markup("\n\n")] if system and index == 0 else []
        segments += [markup("[INST] "), *head, *user_segments(message), markup(" [/INST]")]
    return segments


TEMPLATE = Template(render, markers=("[INST]", "[/INST]"), parse=partial(parse_text, before=" "))
