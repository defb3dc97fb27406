"""Llama-2-Chat's chat format: ``[INST] ... [/INST]``, with BOS and EOS around every exchange.

The reference is ``generation.py`` of facebookresearch/llama.
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


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render ``<s>[INST] <<SYS>>..<</SYS>> question [/INST] answer </s><s>[INST] ...``."""
    system, turns = split_system(messages)
    segments: list[Segment] = []
    for index, message in enumerate(turns):
        if message.role == "assistant":
            segments += reply_segments(message, before=" ", after=" ")
            continue
        # generation.py encodes each exchange with its own BOS and EOS.
        segments += [BOS, markup("[INST] ")]
        if system and index == 0:
            segments += [markup("<<SYS>>\n"), Segment("content", system), markup("\n<</SYS>>\n\n")]
        segments += [Segment("content", with_context(message)), markup(" [/INST]")]
    return segments


TEMPLATE = Template(
    render,
    markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    parse=partial(parse_text, before=" ", after=" "),
)
