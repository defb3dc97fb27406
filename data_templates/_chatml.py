"""ChatML's turns (OpenAI), for the templates that are written in them."""

from collections.abc import Sequence

from data_templates._segments import Message, Segment, asked, markup, reply

START, END = "<|im_start|>", "<|im_end|>"
MARKERS = (START, END)


def dialogue(messages: Sequence[Message]) -> list[Segment]:
    """Return system, user and assistant turns; after a user's turn the assistant's is opened."""
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
    """Return a turn that the model reads."""
    return [markup(f"{START}{role}\n"), *said, markup(f"{END}\n")]


def opened() -> Segment:
    """Return the beginning of the assistant's turn, where a prompt ends."""
    return markup(f"{START}assistant\n")


def answered(message: Message) -> list[Segment]:
    """Return the rest of the assistant's turn: what it says, and the token that ends the turn."""
    return [*reply(message, end=END), markup("\n")]
