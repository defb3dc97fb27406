"""ARC: grade-school science questions; the likelihood of the correct choice's text (also ko-ARC).

Clark et al. 2018, arXiv 1803.05457. Rows: ``question``, ``choices`` with ``text`` and ``label``,
``answerKey``; in the authors' files the choices are inside of ``question``, as ``stem`` and ``choices``.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.fields import RowError, checked_text, short_repr, text_field
from finetune.data.readers import SourceRow
from finetune.evaluation.items import EvalItem
from finetune.evaluation.layouts._questions import question_prompt


def read_row(row: SourceRow) -> list[EvalItem]:
    """Return the question of a row."""
    question: Any = row.columns.get("question")
    choices: Any = row.columns.get("choices")
    if isinstance(question, Mapping):
        question, choices = question.get("stem"), question.get("choices")
    texts, labels = _texts_and_labels(choices)
    key = str(row.columns.get("answerKey"))
    if key not in labels:
        raise RowError("answerKey", f"found {key!r:.60}", f"one of the labels {', '.join(labels)}")
    prompt = question_prompt(checked_text(question, "question"))
    item_id = text_field(row.columns, "id", optional=True)
    return [EvalItem(item_id, prompt, choices=tuple(texts), correct=(labels.index(key),))]


def _texts_and_labels(choices: Any) -> tuple[list[str], list[str]]:
    if isinstance(choices, Mapping) and {"text", "label"} <= set(choices):
        return list(choices["text"]), [str(label) for label in choices["label"]]
    if isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        return [str(choice["text"]) for choice in choices], [str(choice["label"]) for choice in choices]
    raise RowError("choices", f"found {short_repr(choices)}", "lists `text` and `label`")
