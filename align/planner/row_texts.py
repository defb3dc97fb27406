"""Training rows as text, prompt and completions, without a tokenizer."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from align.preference.rows.comparison_rows import ComparisonRows
from align.preference.settings import PreferenceSettings
from align.rl.prompt_rows import PromptRows
from align.rl.settings import PromptSettings
from data_templates.segments import REPLY_ROLES, Message, Template, TemplateError, render, render_document
from finetune.data.conversation_rows import ConversationRows
from finetune.data.load import load_rows
from finetune.data.report import DataReport
from finetune.recipe.discovery import TEMPLATES, load_plugin
from finetune.recipe.settings import DataSettings

TOKENIZER_TEMPLATE = "tokenizer"
ASSUMED_MARKUP = "<|im_start|>assistant\n<|im_end|>\n"
"""Approximates the markup of the tokenizer's own chat template, which is not rendered here."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row's messages: a conversation, or a prompt and its completions."""

    messages: Sequence[Message]
    completions: Sequence[Message] = ()
    document: bool = False

    @property
    def size(self) -> int:
        """Return the characters of its contents."""
        return sum(len("".join(turn.key[1:])) for turn in (*self.messages, *self.completions))


@dataclass(frozen=True, slots=True)
class RowText:
    """A row's text: the prompt and other turns, the completions, and what follows the last one.

    ``bos``: whether it begins with the tokenizer's BOS. ``ends``: the EOS tokens of each completion, which
    the texts do not have. ``other_ends``: those of other turns.
    """

    prompt: str
    completions: tuple[str, ...]
    bos: bool = False
    ends: int = 0
    other_ends: int = 0
    after: str = ""


def load_training_rows(settings: DataSettings, seed: int, *, labels: bool = False) -> list[PlannedRow]:
    """Return the training rows of local data.

    Args:
        settings: the recipe's data section.
        seed: of the held-out split and of a mixture.
        labels: whether completions have labels (KTO) instead of being compared.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    reports = DataReport(), DataReport()
    if isinstance(settings, PreferenceSettings):
        kind = ComparisonRows(settings, "labels" if labels else "rankings")
        comparisons, _ = load_rows(kind, settings, seed, *reports)
        return [PlannedRow(row.prompt, row.replies) for row in comparisons]
    if isinstance(settings, PromptSettings):
        prompts, _ = load_rows(PromptRows(), settings, seed, *reports)
        return [PlannedRow(row.prompt) for row in prompts]
    conversations, _ = load_rows(ConversationRows(), settings, seed, *reports)
    return [PlannedRow(row.messages, document=row.is_document) for row in conversations]


def row_renderer(data: DataSettings, base: Path | None) -> Callable[[PlannedRow], RowText]:
    """Return a function that renders rows as a run does, the tokenizer's chat template included.

    Args:
        data: the template, its options and the system prompt.
        base: the folder with the tokenizer's files; None if they are not on this machine.

    Raises:
        UserError: unknown template.
    """
    render_messages = _chat_template(data, base) if data.template == TOKENIZER_TEMPLATE else None
    if render_messages is None:
        template = None if data.template == TOKENIZER_TEMPLATE else _load_template(data.template)
        render_messages = partial(_render_messages, template)

    def render_row(row: PlannedRow) -> RowText:
        if row.document:
            # All tokens of a document are trained on.
            return RowText("", tuple(piece.text for piece in render_document(row.messages)), True, 1)
        messages = list(row.messages)
        if data.system_prompt and all(turn.role != "system" for turn in messages):
            messages.insert(0, Message("system", data.system_prompt))
        if not row.completions:
            return render_messages(messages)
        # Only the completion is trained, and earlier replies are a part of the prompt.
        prompt = [replace(turn, trained=False) for turn in messages]
        texts = [render_messages([*prompt, replace(turn, trained=True)]) for turn in row.completions]
        return RowText(
            texts[0].prompt,
            tuple(text.completions[-1] if text.completions else "" for text in texts),
            bos=texts[0].bos,
            ends=texts[0].ends,
            other_ends=texts[0].other_ends,
        )

    return render_row


def _load_template(name: str) -> Template:
    template: Template = load_plugin(TEMPLATES, name, where="data.template").TEMPLATE
    return template


def _render_messages(template: Template | None, messages: Sequence[Message]) -> RowText:
    """Return the text outside of trained replies, and that of the replies."""
    if template is None:
        return _approximate_text(messages)
    try:
        segments, _ = render(template, messages)
    # The run reports rows that the template refuses; the plan only needs their length.
    except TemplateError:
        return _approximate_text(messages)
    last_trained = max((index for index, piece in enumerate(segments) if piece.trained), default=-1)
    before, after = segments[: last_trained + 1], segments[last_trained + 1 :]
    if last_trained < 0:
        before, after = after, before
    inside = "".join(piece.text for piece in before if piece.trained)
    return RowText(
        "".join(piece.text for piece in before if not piece.trained),
        (inside,) if inside else (),
        bos=any(piece.kind == "bos" for piece in segments),
        # An end with a text is the template's own token, or EOS in its place: one token.
        ends=sum(piece.kind == "eos" and not piece.text and piece.trained for piece in segments),
        other_ends=sum(piece.kind == "eos" and not piece.text and not piece.trained for piece in segments),
        after="".join(piece.text for piece in after),
    )


def _chat_template(data: DataSettings, base: Path | None) -> Callable[[Sequence[Message]], RowText] | None:
    """Return a function that renders with the tokenizer's own template; None if that is not readable here."""
    source = None if base is None else _template_source(base)
    if source is None:
        return None
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8")) if base else {}
    tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
    # The environment of transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    template = environment.from_string(source)
    variables = {**tokens, **data.template_options, "raise_exception": _refuse, "strftime_now": _strftime}

    def text_of(messages: Sequence[Message], opened: bool) -> str:
        turns = [
            {"role": turn.role, "content": "\n\n".join(filter(None, (turn.content, turn.context)))}
            for turn in messages
        ]
        return template.render(messages=turns, add_generation_prompt=opened, **variables)

    def render_row(messages: Sequence[Message]) -> RowText:
        try:
            prompt = messages[:-1] if messages[-1].role in REPLY_ROLES else messages
            return _split_rendered(text_of(messages, False), text_of(prompt, True), messages)
        # A template may refuse a row; the run reports it.
        except (TemplateRuntimeError, ValueError):
            return _approximate_text(messages)

    return render_row


def _template_source(base: Path) -> str | None:
    """Return the chat template of a tokenizer's folder."""
    if (file := base / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    file = base / "tokenizer_config.json"
    source = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
    return source if isinstance(source, str) else None


def _token_text(token: Any) -> str:
    """Return a token of tokenizer_config.json, which is a text or an object."""
    return str(token["content"] if isinstance(token, dict) else token or "")


def _refuse(message: str) -> None:
    raise ValueError(message)


def _strftime(style: str) -> str:
    return datetime.now().strftime(style)


def _split_rendered(text: str, prompt: str, messages: Sequence[Message]) -> RowText:
    """Split a rendered conversation into trained replies and the rest; a reply ends with its end token."""
    if messages[-1].role not in REPLY_ROLES:
        return RowText(text, ())
    inside, start = [], 0
    for turn in messages:
        if turn.role not in REPLY_ROLES or not turn.trained:
            continue
        content = turn.full_text.strip()
        at = text.find(content, start)
        start = max(at, start) + len(content)
        end = re.match(r"\s*<[^<>\s]+>", text[start:])
        inside.append(content + (end[0] if end else ""))
    if len(inside) == 1 and text.startswith(prompt):
        # One reply: what the template writes after the generation prompt, without what follows its end.
        reply = text[len(prompt) :].rstrip("\n")
        return RowText(prompt, (reply,), after=text[len(prompt) + len(reply) :])
    replies = "".join(inside)
    # Of several replies only the number of characters between them is used.
    return RowText(text[: len(text) - len(replies)], (replies,) if replies else ())


def _approximate_text(messages: Sequence[Message]) -> RowText:
    prompt_texts = (
        turn.content + turn.context + ASSUMED_MARKUP for turn in messages if turn.role not in REPLY_ROLES
    )
    replies = "".join(turn.full_text + ASSUMED_MARKUP for turn in messages if turn.role in REPLY_ROLES)
    return RowText("".join(prompt_texts), (replies,) if replies else ())
