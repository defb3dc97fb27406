"""KoAlpaca v1.1's Korean prompt: question, optional context, answer; single-turn (Beomi/KoAlpaca)."""

from collections.abc import Sequence

from data_templates._segments import (
    BOS,
    Message,
    Segment,
    Template,
    markup,
    only_one_exchange,
    reply,
    split_system,
)


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render one question and its answer; a system turn goes before the question."""
    system, turns = split_system(messages)
    only_one_exchange("koalpaca", turns)
    request = turns[0]
    segments = [BOS]
    if system:
        segments += [Segment("content", system), markup("\n\n")]
    segments += [markup("### 질문: "), Segment("content", request.content)]
    if request.context:
        segments += [markup("\n\n### 맥락: "), Segment("content", request.context)]
    segments.append(markup("\n\n### 답변:"))
    return segments + [piece for message in turns[1:] for piece in reply(message, before=" ")]


TEMPLATE = Template(render, markers=("### 질문:", "### 맥락:", "### 답변:"))
