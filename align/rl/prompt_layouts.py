"""Row layouts accepted as RL prompts: conversations, preference data, plain prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.preference.rows.fields import prepend_system, prompt_turns
from align.preference.rows.layouts import LABELED, RANKINGS, PreferenceRow
from data_templates.segments import Message
from finetune.data.layouts import CONVERSATION_LAYOUTS, Layout, text_field

PromptColumns = Mapping[str, Any]
PromptReader = Callable[[PromptColumns], list[Message]]


def _best_reply_reader(read_row: Callable[[PromptColumns], PreferenceRow]) -> PromptReader:
    """Return a reader of the prompt with its best reply, or without a reply if none is known to be good."""

    def read_messages(columns: PromptColumns) -> list[Message]:
        row = read_row(columns)
        best = (
            row.completions[0]
            if row.ordered
            else max(row.completions, key=lambda completion: completion.score)
        )
        # A single completion that is labeled bad is no reference answer.
        is_bad = len(row.completions) == 1 and best.score == 0
        return [*best.prompt, *([best.reply] if best.reply is not None and not is_bad else [])]

    return read_messages


def _instruction_messages(columns: PromptColumns) -> list[Message]:
    context = text_field(columns, "input", optional=True)
    return prepend_system(columns, [Message("user", text_field(columns, "instruction"), context=context)])


PROMPT_LAYOUTS: Sequence[Layout[list[Message]]] = (
    *(
        Layout(layout.name, layout.required, _best_reply_reader(layout.parse))
        for layout in (*RANKINGS, *LABELED)
    ),
    *CONVERSATION_LAYOUTS,
    Layout("prompt", ("prompt",), lambda columns: prompt_turns(columns, "prompt")),
    Layout("instruction", ("instruction",), _instruction_messages),
    Layout("question", ("question",), lambda columns: prompt_turns(columns, "question")),
)
"""The first layout that matches is used: preference data, conversations, plain prompts."""
