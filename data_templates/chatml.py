"""ChatML (OpenAI; Qwen, SmolLM): turns between ``<|im_start|>role`` and ``<|im_end|>``; multi-turn.

A reply ends with ``<|im_end|>`` if the tokenizer has it, with EOS otherwise. There is no default system turn:
``qwen`` is the same format with Qwen2.5's default system prompt, ``toolcall`` the same with tools. A thought
precedes its reply in ``<think>`` tags, as Qwen3 writes it; unlike Qwen3's own template, this one keeps the
thoughts of earlier replies.
"""

from collections.abc import Sequence

from data_templates._chatml import CHATML_MARKERS, IM_END, render_dialogue
from data_templates._parsing import parse_thought
from data_templates.segments import BOS, Message, Segment, Template


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; a user turn is followed by the assistant header."""
    return [BOS, *render_dialogue(messages)]


TEMPLATE = Template(render, markers=CHATML_MARKERS, stop=(IM_END,), reasoning=True, parse=parse_thought)
