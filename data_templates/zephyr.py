"""Zephyr's chat format: ``<|system|>``, ``<|user|>`` and ``<|assistant|>``; EOS ends every turn.

The reference is the chat template of HuggingFaceH4/zephyr-7b-beta.
"""

from collections.abc import Sequence

from data_templates.segments import BOS, Message, Segment, Template, markup, reply_segments, user_segments

UNTRAINED_EOS = Segment("eos")
"""The EOS after a system or user turn, which carries no loss."""


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; a user turn is followed by the assistant header."""
    segments = [BOS]
    for message in messages:
        if message.role == "assistant":
            segments += [*reply_segments(message), markup("\n")]
            continue
        segments += [markup(f"<|{message.role}|>\n"), *user_segments(message), UNTRAINED_EOS, markup("\n")]
        if message.role == "user":
            segments.append(markup("<|assistant|>\n"))
    return segments


TEMPLATE = Template(render, markers=("<|system|>", "<|user|>", "<|assistant|>"))
