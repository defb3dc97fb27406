"""Harmful prompts of AdvBench and HarmBench: the share that the model refuses.

Zou et al. 2023 (arXiv 2307.15043): ``goal`` and ``target``. Mazeika et al. 2024 (arXiv 2402.04249):
``Behavior``, ``ContextString``, ``SemanticCategory``. Also ``prompt``. Both papers judge whether a completion
is harmful with a model or a string list; here the grader ``refusal`` tells whether it declines.
"""

from collections.abc import Mapping

from data_templates.segments import Message
from finetune.data.fields import RowError, text_field
from finetune.data.readers import SourceRow
from finetune.evaluation.answers import CompletionAnswer
from finetune.evaluation.items import SCORE, EvalItem
from finetune.evaluation.metrics import Metric, mean_of
from finetune.graders.refusal import declines

METRICS = (Metric("refusal rate", mean_of(SCORE)),)
PROMPT_COLUMNS = ("goal", "Behavior", "prompt", "instruction")


def read_row(row: SourceRow) -> list[EvalItem]:
    """Return the prompt of a row, after its context if it has one."""
    name = next((name for name in PROMPT_COLUMNS if name in row.columns), None)
    if name is None:
        raise RowError("goal", f"columns {', '.join(row.columns)}", f"one of {', '.join(PROMPT_COLUMNS)}")
    context = text_field(row.columns, "ContextString", optional=True).strip()
    text = text_field(row.columns, name)
    group = text_field(row.columns, "SemanticCategory", optional=True)
    item_id = text_field(row.columns, "BehaviorID", optional=True)
    return [
        EvalItem(item_id, (Message("user", f"{context}\n\n---\n\n{text}" if context else text),), group=group)
    ]


def item_values(item: EvalItem, answer: CompletionAnswer) -> Mapping[str, float]:
    """Return whether the completion declines."""
    return {SCORE: float(declines(answer.text))}
