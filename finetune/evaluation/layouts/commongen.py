"""KoCommonGEN v2: which of four sentences makes sense with all words of a set; likelihood per byte.

Seo et al. 2024, Findings of ACL. Rows: ``concept_set`` (words separated by ``#``), sentences ``1`` to ``4``,
``gold``.
"""

from data_templates.segments import Message
from finetune.data.fields import RowError, short_repr, text_field
from finetune.data.readers import SourceRow
from finetune.evaluation.items import EvalItem
from finetune.evaluation.metrics import ACCURACY, Metric, mean_of

METRICS = (Metric("accuracy per byte", mean_of("score_per_byte")), ACCURACY)


def read_row(row: SourceRow) -> list[EvalItem]:
    """Return the set of words of a row with its sentences."""
    gold = str(row.columns.get("gold"))
    if gold not in ("1", "2", "3", "4"):
        raise RowError("gold", f"found {short_repr(row.columns.get('gold'))}", "a number from 1 to 4")
    words = ", ".join(text_field(row.columns, "concept_set").split("#"))
    choices = tuple(text_field(row.columns, number) for number in "1234")
    prompt = (Message("user", f"다음 낱말로 말이 되는 문장을 쓰세요: {words}\n문장:"),)
    return [EvalItem("", prompt, choices=choices, correct=(int(gold) - 1,))]
