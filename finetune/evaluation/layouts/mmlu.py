"""MMLU: four choices with letters; the likelihood of the correct letter (also ko-MMLU and KMMLU).

Hendrycks et al. 2021, arXiv 2009.03300. Rows: ``question``, ``choices``, ``answer`` (index or letter) and
``subject``; or KMMLU's ``A`` to ``D``, an ``answer`` from 1 to 4, and ``Category`` (Son et al. 2024, arXiv
2402.11548).
"""

from finetune.data.fields import text_field
from finetune.data.readers import SourceRow
from finetune.evaluation.items import EvalItem
from finetune.evaluation.layouts._questions import LETTERS, question_prompt, text_list
from finetune.evaluation.metrics import ACCURACY
from finetune.evaluation.rows import choice_index

METRICS = (ACCURACY,)
"""The choices are letters of one byte: accuracy per byte is the same."""


def read_row(row: SourceRow) -> list[EvalItem]:
    """Return the question of a row."""
    columns, answer = row.columns, row.columns.get("answer")
    if "choices" in columns:
        choices = text_list(columns, "choices")
        correct = choice_index(answer, choices)
    else:
        choices = [text_field(columns, letter) for letter in "ABCD"]
        correct = choice_index(answer - 1 if isinstance(answer, int) else answer, choices)
    prompt = question_prompt(text_field(columns, "question"), choices)
    group = text_field(columns, "subject", optional=True) or text_field(columns, "Category", optional=True)
    return [EvalItem("", prompt, choices=tuple(LETTERS[: len(choices)]), correct=(correct,), group=group)]
