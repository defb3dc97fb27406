"""Training rows as text, prompt and completions, without a tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
