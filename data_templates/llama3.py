"""Llama-3's chat: every turn behind a header of special tokens, ended by ``<|eot_id|>``.

The reference is the chat template of meta-llama/Meta-Llama-3-8B-Instruct, which also trims contents (here the
data's blanks stay). The template of Llama-3.1 and later is this behind a system turn with two dates:
``template: model`` writes those, with the tokenizer of an Instruct model.
"""

from collections.abc import Sequence

from data_templates._segments import BOS, Message, Segment, Template, asked, markup, reply

END = "<|eot_id|>"


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; after a user's turn the assistant's is opened."""
    segments = [BOS]
    for message in messages:
        if message.role == "assistant":
            segments += reply(message, end=END)
            continue
        segments += [_header(message.role), *asked(message), markup(END)]
        if message.role == "user":
            segments.append(_header("assistant"))
    return segments


def _header(role: str) -> Segment:
    return markup(f"<|start_header_id|>{role}<|end_header_id|>\n\n")


TEMPLATE = Template(render, markers=("<|start_header_id|>", "<|end_header_id|>", END), stop=(END,))
