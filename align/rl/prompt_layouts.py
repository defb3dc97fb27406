"""Row layouts accepted as RL prompts: conversations, preference data, plain prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.preference.rows.fields import question, with_system
from align.preference.rows.judged import Judged
from align.preference.rows.layouts import LABELLED, RANKINGS
from data_templates._segments import Message
from finetune.data.layouts import LAYOUTS, Layout, text_field

Columns = Mapping[str, Any]
Read = Callable[[Columns], list[Message]]


def _best(read: Callable[[Columns], Judged]) -> Read:
    """Return a reader of the prompt with its best reply, or without a reply if none is known to be good."""

    def messages(columns: Columns) -> list[Message]:
        judged = read(columns)
        best = judged.answers[0] if judged.ordered else max(judged.answers, key=lambda answer: answer.score)
        bad = len(judged.answers) == 1 and best.score == 0
        return [*best.prompt, *([best.reply] if best.reply is not None and not bad else [])]

    return messages


def _instruction(columns: Columns) -> list[Message]:
    context = text_field(columns, "input", optional=True)
    return with_system(columns, [Message("user", text_field(columns, "instruction"), context=context)])


PROMPTS: Sequence[Layout[list[Message]]] = (
    *(Layout(known.name, known.required, _best(known.read)) for known in (*RANKINGS, *LABELLED)),
    *LAYOUTS,
    Layout("prompt", ("prompt",), lambda columns: question(columns, "prompt")),
    Layout("instruction", ("instruction",), _instruction),
    Layout("question", ("question",), lambda columns: question(columns, "question")),
)
"""The first layout that matches is used: preference data, conversations, plain prompts."""
