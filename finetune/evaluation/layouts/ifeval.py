"""IFEval: whether completions follow verifiable instructions, the four accuracies of the paper.

Zhou et al. 2023, arXiv 2311.07911, section 2.2. The headline is the strict accuracy of prompts: all
instructions of a prompt are followed. Rows: ``key``, ``prompt``, ``instruction_id_list``, ``kwargs``.
"""

from collections.abc import Callable, Mapping

from data_templates.segments import Message
from finetune.data.fields import RowError, short_repr, text_field
from finetune.data.readers import SourceRow
from finetune.evaluation.answers import CompletionAnswer
from finetune.evaluation.calibration import FloatArray
from finetune.evaluation.items import SCORE, EvalItem
from finetune.evaluation.metrics import Metric, Totals, mean_of
from finetune.graders.instructions import followed_instructions


def _of_instructions(value: str) -> Callable[[Totals], FloatArray]:
    return lambda totals: totals[value] / totals["instructions"]


METRICS = (
    Metric("prompts (strict)", mean_of(SCORE)),
    Metric("instructions (strict)", _of_instructions("followed_strict")),
    Metric("prompts (loose)", mean_of("prompt_loose")),
    Metric("instructions (loose)", _of_instructions("followed_loose")),
)


def read_row(row: SourceRow) -> list[EvalItem]:
    """Return the prompt of a row."""
    ids, arguments = row.columns.get("instruction_id_list"), row.columns.get("kwargs")
    if not isinstance(ids, list) or not isinstance(arguments, list) or not 0 < len(ids) == len(arguments):
        raise RowError("kwargs", f"found {short_repr(arguments)}", "arguments of each instruction")
    return [EvalItem(str(row.columns.get("key", "")), (Message("user", text_field(row.columns, "prompt")),))]


def item_values(item: EvalItem, answer: CompletionAnswer) -> Mapping[str, float]:
    """Return how many instructions the completion follows, strictly and loosely."""
    ids, arguments = item.columns["instruction_id_list"], item.columns["kwargs"]
    strict, loose = (
        followed_instructions(answer.text, ids, arguments, loose=loose) for loose in (False, True)
    )
    return {
        SCORE: float(all(strict)),
        "prompt_loose": float(all(loose)),
        "followed_strict": float(sum(strict)),
        "followed_loose": float(sum(loose)),
        "instructions": float(len(ids)),
    }
