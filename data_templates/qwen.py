"""Qwen2.5's chat format: ChatML with Qwen's default system prompt for conversations without one.

``chatml`` has no default system turn. The reference is the chat template of Qwen/Qwen2.5-7B-Instruct (Qwen2's
default is only the second sentence; Qwen3 has none, so ``chatml`` is its format without thinking). Qwen's
tokenizers have no BOS, and ``<|im_end|>`` ends a turn.
"""

from collections.abc import Sequence

from data_templates._chatml import CHATML_MARKERS, IM_END, render_dialogue
from data_templates.segments import BOS, Message, Segment, Template

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; a system turn of the data, even an empty one, replaces Qwen's default."""
    # split_system would treat an empty system turn as missing; Qwen's template does not.
    default = [] if messages[0].role == "system" else [Message("system", QWEN_SYSTEM)]
    return [BOS, *render_dialogue([*default, *messages])]


TEMPLATE = Template(render, markers=CHATML_MARKERS, stop=(IM_END,))
