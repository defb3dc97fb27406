"""Gemma's chat format: ``<start_of_turn>user`` and ``<start_of_turn>model``, ended by ``<end_of_turn>``.

There is no system role: the system text goes before the first question. The reference is the chat template of
google/gemma-3-4b-it (Gemma 2's is the same and rejects a system turn), which also strips contents (here the
data's whitespace is preserved).
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

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render the turns; a user turn is followed by the model header."""
    system, turns = split_system(messages)
    segments = [BOS]
    for index, message in enumerate(turns):
        if message.role == "assistant":
            segments += [*reply_segments(message, end=END_OF_TURN), markup("\n")]
            continue
        # Gemma has no system role: its template puts the system text into the first user turn.
        first = [Segment("content", system), markup("\n\n")] if system and index == 0 else []
        segments += [markup(f"{START_OF_TURN}user\n"), *first, *user_segments(message)]
        segments.append(markup(f"{END_OF_TURN}\n{START_OF_TURN}model\n"))
    return segments


TEMPLATE = Template(render, markers=(START_OF_TURN, END_OF_TURN), stop=(END_OF_TURN,))
