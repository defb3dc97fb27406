"""EXAONE 3's chat format (LG AI Research, Korean and English): roles in ``[|brackets|]``, ``[|endofturn|]``.

A conversation without a system text begins with an empty system turn. The reference is the chat template of
LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct.
"""

from collections.abc import Sequence

from data_templates.segments import (
    BOS,
    Message,
    Segment,
    Template,
    markup,
    reply_segments,
    split_system,
    user_segments,
)

ENDOFTURN = "[|endofturn|]"


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; a line feed ends the user's, the end token the others."""
    system, turns = split_system(messages)
    segments = [BOS, markup("[|system|]"), Segment("content", system), markup(f"{ENDOFTURN}\n")]
    for message in turns:
        if message.role == "assistant":
            segments += [*reply_segments(message, end=ENDOFTURN), markup("\n")]
        else:
            segments += [markup("[|user|]"), *user_segments(message), markup("\n[|assistant|]")]
    return segments


TEMPLATE = Template(render, markers=("[|system|]", "[|user|]", "[|assistant|]", ENDOFTURN), stop=(ENDOFTURN,))
