"""KoAlpaca v1.1's Korean prompt: question, optional context, answer; single-turn (Beomi/KoAlpaca)."""

from collections.abc import Sequence
from functools import partial

from data_templates.segments import (
    BOS,
    Message,
    Segment,
    Template,
    check_single_turn,
    markup,
    parse_text,
    reply_segments,
    split_system,
)


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render one question and its answer; a system turn goes before the question."""
    system, turns = split_system(messages)
    check_single_turn("koalpaca", turns)
    request = turns[0]
    segments = [BOS]
    if system:
        segments += [Segment("content", system), markup("\n\n")]
    segments += [markup("### 질문: "), Segment("content", request.content)]
    if request.context:
        segments += [markup("\n\n### 맥락: "), Segment("content", request.context)]
    segments.append(markup("\n\n### 답변:"))
    return segments + [piece for message in turns[1:] for piece in reply_segments(message, before=" ")]


TEMPLATE = Template(
    render, markers=("### 질문:", "### 맥락:", "### 답변:"), parse=partial(parse_text, before=" ")
)
