"""GSM8K: grade-school mathematics; the last number of the completion, by the grader ``number``.

Cobbe et al. 2021, arXiv 2110.14168. Rows: ``question``, ``answer``, a solution that ends with ``#### 72``.
"""

from data_templates.segments import Message
from finetune.data.fields import text_field
from finetune.data.readers import SourceRow
from finetune.evaluation.items import EvalItem


def read_row(row: SourceRow) -> list[EvalItem]:
    """Return the problem of a row."""
    prompt = (Message("user", text_field(row.columns, "question")),)
    return [EvalItem("", prompt, reference=text_field(row.columns, "answer"))]
