"""Llama-3's chat format: each turn has a header of special tokens and ends with ``<|eot_id|>``.

The reference is the chat template of meta-llama/Meta-Llama-3-8B-Instruct, which also strips contents (here
the data's whitespace is preserved). Llama-3.1 and later add a system turn with two dates: use ``template:
tokenizer`` with the tokenizer of an Instruct model for it.
"""

from collections.abc import Sequence

from data_templates.segments import BOS, Message, Segment, Template, markup, reply_segments, user_segments

EOT = "<|eot_id|>"


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; a user turn is followed by the assistant header."""
    segments = [BOS]
    for message in messages:
        if message.role == "assistant":
            segments += reply_segments(message, end=EOT)
            continue
        segments += [_role_header(message.role), *user_segments(message), markup(EOT)]
        if message.role == "user":
            segments.append(_role_header("assistant"))
    return segments


def _role_header(role: str) -> Segment:
    return markup(f"<|start_header_id|>{role}<|end_header_id|>\n\n")


TEMPLATE = Template(render, markers=("<|start_header_id|>", "<|end_header_id|>", EOT), stop=(EOT,))
