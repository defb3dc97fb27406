"""PEFT task type of a model: causal LM or sequence classification."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"


def peft_task_type(model: "PreTrainedModel") -> str:
    """Return PEFT's ``task_type``; with SEQ_CLS PEFT trains and saves the head with the adapter."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = type(model.config)
    has_scoring_model = config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    is_scoring_model = has_scoring_model and isinstance(
        model, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[config]
    )
    return SEQ_CLS if is_scoring_model else CAUSAL_LM
