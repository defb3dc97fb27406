"""ChatML (OpenAI; Qwen, SmolLM): any number of turns, each between ``<|im_start|>role`` and ``<|im_end|>``.

A tokenizer that knows ``<|im_end|>`` ends a reply with it; for one that does not, a reply ends with EOS.
"""

from collections.abc import Sequence

from data_templates._segments import BOS, Message, Segment, Template, markup, reply, with_context

END = "<|im_end|>"


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; after a user's turn the assistant's is opened."""
    segments = [BOS]
    for message in messages:
        if message.role == "assistant":
            segments += [*reply(message, end=END), markup("\n")]
            continue
        segments += [
            markup(f"<|im_start|>{message.role}\n"),
            Segment("content", with_context(message)),
            markup(f"{END}\n"),
        ]
        if message.role == "user":
            segments.append(markup("<|im_start|>assistant\n"))
    return segments


TEMPLATE = Template(render, markers=("<|im_start|>", END), stop=(END,))
