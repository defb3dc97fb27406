"""Express a run's template as a chat template (Jinja), which transformers, vLLM and llama.cpp read.

The text around the turns is found by rendering conversations of placeholders with the run's own encoder, so
that BOS, end tokens and the system prompt are those of the run. The result is rendered and compared with the
encoder's text; a template that is not these pieces (``flan`` selects a phrasing by hash) has none.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from data_templates.segments import Message, TemplateError
from finetune.data.conversation import with_control_suffix
from finetune.data.tokens import Encoder

PLACEHOLDERS = SYSTEM, FIRST, REPLY, SECOND, SECOND_REPLY = tuple(f"\ue000{n}\ue001" for n in range(5))
"""Texts of private use characters, which no template contains, changes or strips."""
QUESTIONS = ("a b", "c", "Why is the sky blue?", "2 + 2 =", "서울은 어디에 있나요?")
"""Several texts, because a template may depend on the text."""
TURN_ERROR = "expected an optional system turn, then user and assistant alternating"
SINGLE_TURN_ERROR = "expected one user turn and its reply: the model was trained on single turns"
TOOLS_ERROR = "this template has no tools"


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The text of a template around its turns; None where it accepts one exchange only.

    ``system_last``: the system text precedes the last question. ``blank_is_missing``: a system text of spaces
    is left out. ``prompt_end`` follows a question that is to be answered, ``answered`` one with its reply.
    """

    start: str
    before_system: str
    after_system: str
    system_last: bool
    blank_is_missing: bool
    prompt_end: str
    answered: str
    reply_end: str
    between: str | None
    has_reasoning: bool


def export_chat_template(encoder: Encoder) -> str | None:
    """Return the run's template as a chat template; None if it cannot be expressed as one."""
    if encoder.name == "tokenizer":
        body = encoder.tokenizer.chat_template
    else:
        # A default system text is put before the turns, and goes where the template puts the data's.
        bare = copy.copy(encoder)
        bare.system = None
        try:
            body = _format(_find_pieces(bare))
        except (TemplateError, ValueError):
            return None
    if not isinstance(body, str):  # several templates by name
        return None
    text = "\n".join([*_defaults(encoder), body])
    return text if _renders_equally(encoder, text) else None


def template_text(encoder: Encoder, messages: Sequence[Message]) -> str | None:
    """Return the text of a conversation or prompt as the run trains it; None if its template refuses it."""
    try:
        return encoder.whole_text(with_control_suffix(messages, encoder.control_suffix))
    except TemplateError:
        return None


def chat_template_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str | None = None
) -> str | None:
    """Return a conversation's text by a chat template, the tokenizer's by default; None if it refuses."""
    is_prompt = messages[-1].role == "user"
    try:
        return str(
            tokenizer.apply_chat_template(
                as_dicts(messages),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=is_prompt,
            )
        )
    except (JinjaError, TypeError, ValueError):
        return None


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return turns as chat templates take them."""
    return [
        {"role": turn.role, "content": turn.content}
        | ({"reasoning_content": turn.reasoning} if turn.reasoning else {})
        for turn in messages
    ]


def _conversations(has_reasoning: bool) -> list[tuple[Message, ...]]:
    """Return the conversations on which both must agree: one to three exchanges, with and without system."""
    answers = [Message("assistant", text) for text in ("d", "It scatters.\nMore in red.", "4")]
    if has_reasoning:
        answers[1] = Message("assistant", "It scatters.", reasoning="hm")
    user = [Message("user", text) for text in QUESTIONS]
    prompts = [(question,) for question in user]
    exchange = (user[0], answers[0])
    longer = (*exchange, user[1], answers[1], user[2])
    bodies = [*prompts, exchange, longer[:3], longer[:4], longer, (*longer, answers[2])]
    return [*bodies, *((Message("system", "s t"), *body) for body in bodies)]


def _renders_equally(encoder: Encoder, template: str) -> bool:
    conversations = _conversations(encoder.template.reasoning and encoder.reasoning == "keep")
    texts = [template_text(encoder, conversation) for conversation in conversations]
    # A single-turn template refuses several turns; the chat template then raises too.
    return any(texts) and texts == [
        chat_template_text(encoder.tokenizer, conversation, template) for conversation in conversations
    ]


def _find_pieces(encoder: Encoder) -> _Pieces:
    """Render placeholders and cut the text at them.

    Raises:
        TemplateError: the template refuses a prompt.
        ValueError: a placeholder is missing from the text.
    """
    system, first, reply = Message("system", SYSTEM), Message("user", FIRST), Message("assistant", REPLY)
    more = (first, reply, Message("user", SECOND), Message("assistant", SECOND_REPLY))

    def cut(*messages: Message) -> list[str]:
        text = encoder.whole_text(with_control_suffix(messages, encoder.control_suffix))
        return re.split("|".join(PLACEHOLDERS), text)

    start, prompt_end = cut(first)
    _, answered, reply_end = cut(first, reply)
    before_system, after_system, _ = cut(system, first)
    between, system_last = None, False
    if template_text(encoder, more) is not None:
        between = cut(*more)[2]
        text = encoder.whole_text((system, *more))
        system_last = text.index(SYSTEM) > text.index(FIRST)
    blank = Message("system", " ")
    blank_is_missing = template_text(encoder, (blank, first)) == template_text(encoder, (first,))
    has_reasoning = encoder.template.reasoning and encoder.reasoning == "keep"
    return _Pieces(
        start,
        before_system,
        after_system,
        system_last,
        blank_is_missing,
        prompt_end,
        answered,
        reply_end,
        between,
        has_reasoning,
    )


def _format(pieces: _Pieces) -> str:
    """Return the Jinja text."""
    has_system = "messages[0].role == 'system'"
    if pieces.blank_is_missing:
        has_system += " and messages[0].content.strip()"
    thought = ""
    if pieces.has_reasoning:
        thought = (
            "{%- if message.reasoning_content %}"
            '{{- "<think>\\n" + message.reasoning_content + "\\n</think>\\n\\n" }}'
            "{%- endif %}"
        )
    between = _quote(pieces.between or "")
    if pieces.system_last:
        with_system = f"{{{{- messages[0].content + {_quote(pieces.after_system)} }}}}"
        opening = [
            f"{{{{- {_quote(pieces.start)} if loop.first else {between} }}}}",
            f"{{%- if has_system and loop.index0 >= turns|length - 2 %}}{with_system}{{%- endif %}}",
        ]
    else:
        with_system = f"{_quote(pieces.before_system)} + messages[0].content + {_quote(pieces.after_system)}"
        opening = [
            f"{{%- if not loop.first %}}{{{{- {between} }}}}",
            f"{{%- elif has_system %}}{{{{- {with_system} }}}}",
            f"{{%- else %}}{{{{- {_quote(pieces.start)} }}}}{{%- endif %}}",
        ]
    question_end = f"{_quote(pieces.prompt_end)} if loop.last else {_quote(pieces.answered)}"
    limit = [] if pieces.between is not None else [_raise_if("turns|length > 2", SINGLE_TURN_ERROR)]
    lines = [
        _raise_if("tools", TOOLS_ERROR),
        f"{{%- set has_system = {has_system} %}}",
        "{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}",
        *limit,
        "{%- for message in turns %}",
        _raise_if("message.role != ('user' if loop.index0 % 2 == 0 else 'assistant')", TURN_ERROR),
        "{%- if message.role == 'user' %}",
        *opening,
        f"{{{{- message.content + ({question_end}) }}}}",
        "{%- else %}",
        *([thought] if thought else []),
        "{{- message.content }}",
        f"{{%- if loop.last %}}{{{{- {_quote(pieces.reply_end)} }}}}{{%- endif %}}",
        "{%- endif %}",
        "{%- endfor %}",
    ]
    return "\n".join(lines)


def _defaults(encoder: Encoder) -> list[str]:
    """Return the lines that set the run's variables and system prompt where the caller sets none."""
    lines = [_default(name, value) for name, value in encoder.template_options.items()]
    if encoder.system:
        turn = f"[{{'role': 'system', 'content': {_quote(encoder.system)}}}]"
        set_messages = f"{{%- set messages = {turn} + messages %}}"
        lines.append(f"{{%- if messages[0].role != 'system' %}}{set_messages}{{%- endif %}}")
    return lines


def _default(name: str, value: Any) -> str:
    return f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"


def _literal(value: Any) -> str:
    """Return a value of a recipe as a Jinja expression, which has JSON's lists and Python's constants."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quote(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return _quote(value) if isinstance(value, str) else str(value).lower()


def _raise_if(condition: str, message: str) -> str:
    return f"{{%- if {condition} %}}{{{{- raise_exception({_quote(message)}) }}}}{{%- endif %}}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
