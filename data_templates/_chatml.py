"""ChatML turns (OpenAI), shared by the templates in that format."""

from collections.abc import Sequence

from data_templates._segments import Message, Segment, asked, markup, reply

START, END = "<|im_start|>", "<|im_end|>"
MARKERS = (START, END)


def dialogue(messages: Sequence[Message]) -> list[Segment]:
    """Render system, user and assistant turns; a user turn is followed by the assistant header."""
    segments: list[Segment] = []
    for message in messages:
        if message.role == "assistant":
            segments += answered(message)
            continue
        segments += turn(message.role, asked(message))
        if message.role == "user":
            segments.append(opened())
    return segments


def turn(role: str, said: Sequence[Segment]) -> list[Segment]:
    """Return a turn without loss."""
    return [markup(f"{START}{role}\n"), *said, markup(f"{END}\n")]


def opened() -> Segment:
    """Return the assistant header, the end of a generation prompt."""
    return markup(f"{START}assistant\n")


def answered(message: Message) -> list[Segment]:
    """Return the rest of the assistant's turn: its text and the end-of-turn token."""
    # The line feed after the end token is not generated, so it carries no loss.
    return [*reply(message, end=END), markup("\n")]
