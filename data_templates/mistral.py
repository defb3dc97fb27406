"""Mistral-Instruct's chat format since tokenizer v2 (v0.3): ``[INST] question[/INST] answer``.

The system text goes before the *last* question, wherever that is (chat template of
mistralai/Mistral-7B-Instruct-v0.3; ``InstructTokenizerV2`` and ``V3`` of mistralai/mistral-common). So in a
conversation with a system text only the last reply carries loss: when the earlier replies were generated, the
system text was before their own questions. ``mistral_v1`` is the older format, which trains on all replies.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from data_templates.segments import (
    BOS,
    Message,
    Segment,
    Template,
    markup,
    parse_text,
    reply_segments,
    split_system,
    user_segments,
)


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render ``<s>[INST] question[/INST] answer</s>[INST] ...``."""
    system, turns = split_system(messages)
    last = max(index for index, message in enumerate(turns) if message.role == "user")
    segments = [BOS]
    for index, message in enumerate(turns):
        if message.role == "assistant":
            # Earlier replies are conditioned on a prompt that never occurs at generation.
            same_prompt_at_generation = not system or index > last
            segments += reply_segments(
                message if same_prompt_at_generation else replace(message, trained=False), before=" "
            )
            continue
        head = [Segment("content", system), markup("\n\n")] if system and index == last else []
        segments += [markup("[INST]"), markup(" "), *head, *user_segments(message), markup("[/INST]")]
    return segments


TEMPLATE = Template(render, markers=("[INST]", "[/INST]"), parse=partial(parse_text, before=" "))
