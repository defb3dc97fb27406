"""Qwen2.5's chat: ChatML that begins with Qwen's own system text where a conversation has none.

``chatml`` writes no system turn then. The reference is the chat template of Qwen/Qwen2.5-7B-Instruct (Qwen2's
text is the second sentence alone; Qwen3 has none, so that ``chatml`` is its format without thinking). Qwen's
tokenizers have no BOS, and ``<|im_end|>`` ends a turn.
"""

from collections.abc import Sequence

from data_templates._chatml import END, MARKERS, dialogue
from data_templates._segments import BOS, Message, Segment, Template

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; a system turn of the data, even an empty one, takes the place of Qwen's."""
    own = [] if messages[0].role == "system" else [Message("system", SYSTEM)]
    return [BOS, *dialogue([*own, *messages])]


TEMPLATE = Template(render, markers=MARKERS, stop=(END,))
