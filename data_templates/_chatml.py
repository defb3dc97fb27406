"""ChatML turns (OpenAI), shared by the templates in that format."""

from collections.abc import Sequence

from data_templates.segments import Message, Segment, markup, reply_segments, user_segments

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML_MARKERS = (IM_START, IM_END)


def render_dialogue(messages: Sequence[Message]) -> list[Segment]:
    """Render system, user and assistant turns; a user turn is followed by the assistant header."""
    segments: list[Segment] = []
    for message in messages:
        if message.role == "assistant":
            segments += assistant_reply(message)
            continue
        segments += turn_segments(message.role, user_segments(message))
        if message.role == "user":
            segments.append(assistant_header())
    return segments


def turn_segments(role: str, content: Sequence[Segment]) -> list[Segment]:
    """Return a turn without loss."""
    return [markup(f"{IM_START}{role}\n"), *content, markup(f"{IM_END}\n")]


def assistant_header() -> Segment:
    """Return the assistant header, the end of a generation prompt."""
    return markup(f"{IM_START}assistant\n")


def assistant_reply(message: Message) -> list[Segment]:
    """Return the rest of the assistant's turn: its text and the end-of-turn token."""
    # The line feed after the end token is not generated, so it carries no loss.
    return [*reply_segments(message, end=IM_END), markup("\n")]
