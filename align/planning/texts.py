"""Training rows as text, prompt and completions, without a tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from align.preference.rows.comparisons import comparisons, unpaired
from align.preference.rows.judged import Comparison
from align.preference.rows.layouts import LABELLED, PAIRS, RANKINGS
from align.preference.settings import PreferenceSettings
from align.rl.prompt_layouts import PROMPTS
from align.rl.settings import PromptSettings
from data_templates._segments import REPLIES, Message, Template, TemplateError, render, render_document
from finetune.data.gather import gather, held_out_count, places_of, read_place
from finetune.data.layouts import read_rows, recognise_among
from finetune.data.report import DataReport
from finetune.recipe.discovery import TEMPLATES, load_plugin
from finetune.recipe.settings import DataSettings

OWN_TEMPLATE = "model"
MARKUP = "<|im_start|>assistant\n<|im_end|>\n"
"""Stands for the markup of the tokenizer's own chat template, which is not rendered here."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row's messages: a conversation, or a prompt and its completions."""

    messages: Sequence[Message]
    completions: Sequence[Message] = ()
    document: bool = False

    @property
    def size(self) -> int:
        """Return the characters of its contents."""
        return sum(len(turn.content) + len(turn.context) for turn in (*self.messages, *self.completions))


@dataclass(frozen=True, slots=True)
class Said:
    """A row's text: everything outside of completions, and the completions."""

    prompt: str
    replies: tuple[str, ...]


def rows_to_learn(settings: DataSettings, seed: int, *, labels: bool = False) -> list[Row]:
    """Return the training rows of local data.

    Args:
        settings: the recipe's data section.
        seed: of the held-out split and of a mixture.
        labels: whether completions have labels (KTO) instead of being compared.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    if isinstance(settings, PreferenceSettings):
        compared = _comparisons(settings, seed, labels=labels)
        return _less_held_out([Row(row.prompt, row.replies) for row in compared], settings)
    if isinstance(settings, PromptSettings):
        return _less_held_out(_asked(settings, seed), settings)
    train, _ = gather(settings, seed, DataReport(), DataReport())
    return [Row(row.messages, document=row.document) for row in train]


def _comparisons(settings: PreferenceSettings, seed: int, *, labels: bool) -> list[Comparison]:
    report, found = DataReport(), []
    known: Any = (*LABELLED, *PAIRS) if labels else RANKINGS
    for index, place in enumerate(places_of(settings)):
        rows = read_place(place, index, seed)
        names = list(rows[0].columns)
        layout = recognise_among(names, known, columns=place.columns, where=place.name, repair="")
        read = zip(read_rows(rows, layout, place.columns), (row.where for row in rows), strict=True)
        for row in comparisons(list(read), settings, source=index, report=report):
            # KTO trains on each completion of a comparison separately.
            found += unpaired(row) if labels and len(row.replies) > 1 else [row]
    return found


def _asked(settings: PromptSettings, seed: int) -> list[Row]:
    found = []
    for index, place in enumerate(places_of(settings)):
        rows = read_place(place, index, seed)
        names = list(rows[0].columns)
        layout = recognise_among(names, PROMPTS, columns=place.columns, where=place.name, repair="")
        talks = read_rows(rows, layout, place.columns)
        found += [Row(talk[:-1] if talk[-1].role in REPLIES else talk) for talk in talks if talk]
    return found


def _less_held_out(rows: list[Row], settings: DataSettings) -> list[Row]:
    """Drop as many rows as are held out; which ones does not matter for a plan."""
    share = settings.held_out
    return rows if isinstance(share, str) else rows[held_out_count(len(rows), share) :]


def writer(name: str) -> Callable[[Row], Said]:
    """Return a function that renders rows with a template, approximately for ``model``.

    Raises:
        UserError: unknown template.
    """
    template = None if name == OWN_TEMPLATE else _template(name)

    def write(row: Row) -> Said:
        if row.document:
            # All tokens of a document are trained on.
            return Said("", tuple(piece.text for piece in render_document(row.messages)))
        outside, inside = _written(template, row.messages)
        return Said(outside, tuple(turn.content for turn in row.completions) or ((inside,) if inside else ()))

    return write


def _template(name: str) -> Template:
    template: Template = load_plugin(TEMPLATES, name, where="data.template").TEMPLATE
    return template


def _written(template: Template | None, messages: Sequence[Message]) -> tuple[str, str]:
    """Return the text outside of completions, and that of the completions."""
    if template is not None:
        try:
            segments, _ = render(template, messages)
        # The run reports rows that the template refuses; the plan only needs their length.
        except TemplateError:
            return _plainly(messages)
        outside = "".join(piece.text for piece in segments if not piece.reply)
        return outside, "".join(piece.text for piece in segments if piece.reply)
    return _plainly(messages)


def _plainly(messages: Sequence[Message]) -> tuple[str, str]:
    asked = (turn.content + turn.context + MARKUP for turn in messages if turn.role not in REPLIES)
    return "".join(asked), "".join(turn.content + MARKUP for turn in messages if turn.role in REPLIES)
