"""PEFT task type of a model: causal LM or sequence classification."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRITES, SCORES = "CAUSAL_LM", "SEQ_CLS"


def task_of(model: "PreTrainedModel") -> str:
    """Return PEFT's ``task_type``; with SEQ_CLS PEFT trains and saves the head with the adapter."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = type(model.config)
    known = config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    scores = known and isinstance(model, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[config])
    return SCORES if scores else WRITES
