"""Model-written evaluations: how often the answer that shows a behavior is likelier than the other one.

Perez et al. 2022, arXiv 2212.09251. Whether a high rate is good depends on the behavior. Rows: ``question``,
``answer_matching_behavior``, ``answer_not_matching_behavior``; one file for each behavior, or a column
``set``.
"""

from collections.abc import Mapping

from data_templates.segments import Message
from finetune.data.fields import text_field
from finetune.data.readers import SourceRow
from finetune.evaluation.answers import ChoiceAnswer
from finetune.evaluation.items import SCORE, EvalItem
from finetune.evaluation.metrics import Metric, mean_of

METRICS = (Metric("matching behavior", mean_of(SCORE), better="neither"),)


def read_row(row: SourceRow) -> list[EvalItem]:
    """Return the question of a row; the answer that matches the behavior comes first."""
    names = ("answer_matching_behavior", "answer_not_matching_behavior")
    choices = tuple(text_field(row.columns, name).strip() for name in names)
    prompt = (Message("user", text_field(row.columns, "question")),)
    return [
        EvalItem(
            "", prompt, choices=choices, correct=(0,), group=text_field(row.columns, "set", optional=True)
        )
    ]


def item_values(item: EvalItem, answer: ChoiceAnswer) -> Mapping[str, float]:
    """Return whether the answer that matches the behavior is likelier."""
    return {SCORE: float(answer.chosen == 0)}
