"""Which of PEFT's kinds of task a model is for: writing text, or scoring it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRITES, SCORES = "CAUSAL_LM", "SEQ_CLS"


def task_of(model: "PreTrainedModel") -> str:
    """Return PEFT's ``task_type``; with SCORES the head is trained and saved beside the adapter."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = type(model.config)
    known = config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    scores = known and isinstance(model, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[config])
    return SCORES if scores else WRITES
