"""ChatML (OpenAI; Qwen, SmolLM): any number of turns, each between ``<|im_start|>role`` and ``<|im_end|>``.

A tokenizer that knows ``<|im_end|>`` ends a reply with it; for one that does not, a reply ends with EOS.
Nothing is written that the data does not hold: ``qwen`` is the same with Qwen2.5's system text where a row
has none, ``toolcall`` the same with tools.
"""

from collections.abc import Sequence

from data_templates._chatml import END, MARKERS, dialogue
from data_templates._segments import BOS, Message, Segment, Template


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; after a user's turn the assistant's is opened."""
    return [BOS, *dialogue(messages)]


TEMPLATE = Template(render, markers=MARKERS, stop=(END,))
