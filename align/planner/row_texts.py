"""Training rows as text, prompt and completions, without a tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from align.preference.rows.comparisons import Comparison, build_comparisons, split_pair
from align.preference.rows.layouts import LABELED, PAIRS, RANKINGS
from align.preference.settings import PreferenceSettings
from align.rl.prompt_layouts import PROMPT_LAYOUTS
from align.rl.settings import PromptSettings
from data_templates.segments import REPLY_ROLES, Message, Template, TemplateError, render, render_document
from finetune.data.layouts import match_layout, parse_rows
from finetune.data.load import load_conversations, num_held_out, read_rows_of, source_specs
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
    """A row's text: everything outside of completions, and the completions."""

    prompt: str
    completions: tuple[str, ...]


def load_training_rows(settings: DataSettings, seed: int, *, labels: bool = False) -> list[PlannedRow]:
    """Return the training rows of local data.

    Args:
        settings: the recipe's data section.
        seed: of the held-out split and of a mixture.
        labels: whether completions have labels (KTO) instead of being compared.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    if isinstance(settings, PreferenceSettings):
        preference_rows = _load_comparisons(settings, seed, labels=labels)
        return _drop_held_out([PlannedRow(row.prompt, row.replies) for row in preference_rows], settings)
    if isinstance(settings, PromptSettings):
        return _drop_held_out(_prompt_rows(settings, seed), settings)
    train, _ = load_conversations(settings, seed, DataReport(), DataReport())
    return [PlannedRow(row.messages, document=row.is_document) for row in train]


def _load_comparisons(settings: PreferenceSettings, seed: int, *, labels: bool) -> list[Comparison]:
    report, comparison_rows = DataReport(), []
    layouts: Any = (*LABELED, *PAIRS) if labels else RANKINGS
    for index, source_spec in enumerate(source_specs(settings)):
        rows = read_rows_of(source_spec, index, seed)
        names = list(rows[0].columns)
        layout = match_layout(names, layouts, columns=source_spec.columns, where=source_spec.name, repair="")
        parsed_rows = zip(
            parse_rows(rows, layout, source_spec.columns), (row.location for row in rows), strict=True
        )
        for row in build_comparisons(list(parsed_rows), settings, source=index, report=report):
            # KTO trains on each completion of a comparison separately.
            comparison_rows += split_pair(row) if labels and len(row.replies) > 1 else [row]
    return comparison_rows


def _prompt_rows(settings: PromptSettings, seed: int) -> list[PlannedRow]:
    prompt_rows = []
    for index, source_spec in enumerate(source_specs(settings)):
        rows = read_rows_of(source_spec, index, seed)
        names = list(rows[0].columns)
        layout = match_layout(
            names, PROMPT_LAYOUTS, columns=source_spec.columns, where=source_spec.name, repair=""
        )
        conversations = parse_rows(rows, layout, source_spec.columns)
        prompt_rows += [
            # A final reply of the data is not part of the prompt.
            PlannedRow(conversation[:-1] if conversation[-1].role in REPLY_ROLES else conversation)
            for conversation in conversations
            if conversation
        ]
    return prompt_rows


def _drop_held_out(rows: list[PlannedRow], settings: DataSettings) -> list[PlannedRow]:
    """Drop as many rows as are held out; which ones does not matter for a plan."""
    held_out = settings.held_out
    return rows if isinstance(held_out, str) else rows[num_held_out(len(rows), held_out) :]


def row_renderer(name: str) -> Callable[[PlannedRow], RowText]:
    """Return a function that renders rows with a template, approximately for ``tokenizer``.

    Raises:
        UserError: unknown template.
    """
    template = None if name == TOKENIZER_TEMPLATE else _load_template(name)

    def render_row(row: PlannedRow) -> RowText:
        if row.document:
            # All tokens of a document are trained on.
            return RowText("", tuple(piece.text for piece in render_document(row.messages)))
        outside, inside = _render_messages(template, row.messages)
        return RowText(
            outside, tuple(turn.full_text for turn in row.completions) or ((inside,) if inside else ())
        )

    return render_row


def _load_template(name: str) -> Template:
    template: Template = load_plugin(TEMPLATES, name, where="data.template").TEMPLATE
    return template


def _render_messages(template: Template | None, messages: Sequence[Message]) -> tuple[str, str]:
    """Return the text outside of completions, and that of the completions."""
    if template is not None:
        try:
            segments, _ = render(template, messages)
        # The run reports rows that the template refuses; the plan only needs their length.
        except TemplateError:
            return _approximate_text(messages)
        outside = "".join(piece.text for piece in segments if not piece.reply)
        return outside, "".join(piece.text for piece in segments if piece.reply)
    return _approximate_text(messages)


def _approximate_text(messages: Sequence[Message]) -> tuple[str, str]:
    prompt_texts = (
        turn.content + turn.context + ASSUMED_MARKUP for turn in messages if turn.role not in REPLY_ROLES
    )
    return "".join(prompt_texts), "".join(
        turn.full_text + ASSUMED_MARKUP for turn in messages if turn.role in REPLY_ROLES
    )
