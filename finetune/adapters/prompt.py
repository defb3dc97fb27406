"""Prompt tuning: trained embeddings stand before the input's embeddings; nothing inside the model changes.

Lester et al. 2021 (arXiv 2104.08691), section 2. Started from real words where ``init_text`` is given (their section 3.2: the better start).
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._traits import Traits
from finetune.recipe.settings import AdapterSettings, Positive

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(packing=False, virtual_tokens=True)


class Settings(AdapterSettings):
    """Length of the soft prompt and where it starts."""

    method: Literal["prompt"] = Field("prompt", description="trained embeddings before every sequence")
    virtual_tokens: Positive = Field(20, description="length of the soft prompt")
    init_text: str | None = Field(None, description="start from the embeddings of this text; none: of drawn words")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with a trainable soft prompt."""
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

    start = PromptTuningInit.TEXT if settings.init_text else PromptTuningInit.SAMPLE_VOCAB
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.virtual_tokens,
        prompt_tuning_init=start,
        prompt_tuning_init_text=settings.init_text,
        tokenizer_name_or_path=model.config.name_or_path if settings.init_text else None,
    )
    return get_peft_model(model, config)
