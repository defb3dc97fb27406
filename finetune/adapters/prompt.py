"""Prompt tuning: trained embeddings are prepended to the input embeddings; the model is frozen.

Lester et al. 2021 (arXiv 2104.08691), section 2. Initialized from the embeddings of real tokens, sampled or
those of ``init_text`` (section 3.2: better than random values).
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import VIRTUAL_TOKENS_NOT_MERGEABLE, Traits
from finetune.recipe.settings import Dimension, NonEmptyStr, VirtualTokenSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    packing=False,
    merge_unsupported=VIRTUAL_TOKENS_NOT_MERGEABLE,
    learning_rate=1e-3,
    init_only=("init_text",),
)  # huggingface/peft, method_comparison


class Settings(VirtualTokenSettings):
    """Length of the soft prompt and its initialization."""

    method: Literal["prompt"] = Field("prompt", description="trained embeddings before every sequence")
    # 20: longer prompts gain little (the paper's section 3.2, "Prompt Length").
    virtual_tokens: Dimension = Field(20, description="length of the soft prompt")
    init_text: NonEmptyStr | None = Field(
        None, description="initialize from the embeddings of this text; null: from those of random tokens"
    )


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with a trainable soft prompt."""
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

    init = PromptTuningInit.TEXT if settings.init_text else PromptTuningInit.SAMPLE_VOCAB
    config = PromptTuningConfig(
        task_type=peft_task_type(model),
        num_virtual_tokens=settings.virtual_tokens,
        prompt_tuning_init=init,
        prompt_tuning_init_text=settings.init_text,
        tokenizer_name_or_path=model.config.name_or_path if settings.init_text else None,
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
