"""Stanford Alpaca's prompt, with and without an input; single-turn (tatsu-lab/stanford_alpaca, train.py)."""

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
)

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
ALPACA_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render one instruction and its answer; a system turn replaces the preamble."""
    system, turns = split_system(messages)
    check_single_turn("alpaca", turns)
    request = turns[0]
    preamble = ALPACA_PREAMBLE_WITH_INPUT if request.context else ALPACA_PREAMBLE
    # A system text of the data is content, so that markers in it are escaped.
    head = Segment("content", system) if system else markup(preamble)
    segments = [BOS, head, markup("\n\n### Instruction:\n"), Segment("content", request.content)]
    if request.context:
        segments += [markup("\n\n### Input:\n"), Segment("content", request.context)]
    segments.append(markup("\n\n### Response:"))
    return segments + [piece for message in turns[1:] for piece in reply_segments(message)]


TEMPLATE = Template(render, markers=("### Instruction:", "### Input:", "### Response:"))
