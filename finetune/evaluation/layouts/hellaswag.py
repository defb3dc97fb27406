"""HellaSwag: which of four endings continues a text; likelihood per byte (also ko-HellaSwag).

Zellers et al. 2019, arXiv 1905.07830. Rows: ``ctx`` (or ``ctx_a`` and ``ctx_b``), ``activity_label``,
``endings``, ``label``, ``source_id``. Endings have different lengths, so that the headline is the accuracy
per byte.
"""

import re

from data_templates.segments import Message
from finetune.data.fields import text_field
from finetune.data.readers import SourceRow
from finetune.evaluation.items import EvalItem
from finetune.evaluation.layouts._questions import text_list
from finetune.evaluation.metrics import ACCURACY, Metric, mean_of
from finetune.evaluation.rows import choice_index

METRICS = (Metric("accuracy per byte", mean_of("score_per_byte")), ACCURACY)


def read_row(row: SourceRow) -> list[EvalItem]:
    """Return the text of a row with its endings."""
    columns = row.columns
    context = text_field(columns, "ctx", optional=True)
    if "ctx_a" in columns:
        second = text_field(columns, "ctx_b", optional=True)
        context = f"{text_field(columns, 'ctx_a')} {second[:1].upper()}{second[1:]}".strip()
    activity = text_field(columns, "activity_label", optional=True)
    endings = text_list(columns, "endings")
    text = _without_markup(f"{activity}: {context}" if activity else context)
    choices = tuple(_without_markup(ending) for ending in endings)
    correct = choice_index(columns.get("label"), endings)
    source = text_field(columns, "source_id", optional=True)
    return [EvalItem("", (Message("user", text),), choices=choices, correct=(correct,), cluster=source)]


def _without_markup(text: str) -> str:
    # Rows from WikiHow have marks such as [title] and [step].
    text = re.sub(r"\[[^\]]*\]", "", text.replace(" [title]", ". "))
    return " ".join(text.split())
