"""Classification: the text, the mark `### Label:`, and the label (single-turn)."""

from collections.abc import Sequence

from data_templates.segments import (
    BOS,
    Message,
    Segment,
    Template,
    check_single_turn,
    markup,
    reply_segments,
    split_system,
    with_context,
)


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render a text and its label; a system turn, such as the meaning of the labels, goes first."""
    system, turns = split_system(messages)
    check_single_turn("classify", turns)
    head = [BOS, Segment("content", system), markup("\n\n")] if system else [BOS]
    segments = [*head, Segment("content", with_context(turns[0])), markup("\n\n### Label:\n")]
    return segments + [piece for message in turns[1:] for piece in reply_segments(message)]


TEMPLATE = Template(render, markers=("### Label:",))
