"""Prompt tuning: trained embeddings are prepended to the input embeddings; the model is frozen.

Lester et al. 2021 (arXiv 2104.08691), section 2. Initialized from the embeddings of real tokens, sampled or
those of ``init_text`` (section 3.2: better than random values).
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._task import task_of
from finetune.adapters._traits import IN_THE_INPUT, Traits
from finetune.recipe.settings import Positive, Text, VirtualTokenSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    packing=False, merge=IN_THE_INPUT, learning_rate=1e-3, at_start=("init_text",)
)  # huggingface/peft, method_comparison


class Settings(VirtualTokenSettings):
    """Length of the soft prompt and its initialization."""

    method: Literal["prompt"] = Field("prompt", description="trained embeddings before every sequence")
    # 20: longer prompts gain little (the paper's section 3.2, "Prompt Length").
    virtual_tokens: Positive = Field(20, description="length of the soft prompt")
    init_text: Text | None = Field(
        None, description="initialize from the embeddings of this text; null: of random tokens"
    )


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with a trainable soft prompt."""
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

    start = PromptTuningInit.TEXT if settings.init_text else PromptTuningInit.SAMPLE_VOCAB
    config = PromptTuningConfig(
        task_type=task_of(model),
        num_virtual_tokens=settings.virtual_tokens,
        prompt_tuning_init=start,
        prompt_tuning_init_text=settings.init_text,
        tokenizer_name_or_path=model.config.name_or_path if settings.init_text else None,
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
