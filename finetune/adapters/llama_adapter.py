r"""LLaMA-Adapter: trained prompts that the upper layers attend to through a zero-initialized gate.

Zhang et al. 2023 (arXiv 2303.16199), equations 6 to 8: the attention to the prompt has a separate softmax,
times a trained gate initialized to g = 0, so at initialization the model equals the base. PEFT has one gate
per layer; the authors' code has one per head, and its training script applies tanh to it.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import SCORE_HEAD_NOT_SAVED, Traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import AdapterSettings, Dimension

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    merge_unsupported="its attention to the prompt cannot be merged into base weights",
    scoring_unsupported=SCORE_HEAD_NOT_SAVED,
    engines=("native",),  # TRL replaces the head of the base, and does not find it inside PEFT's wrapper
    learning_rate=9e-3,
)  # the authors' script: 9e-3 at a batch of 256

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "gpt2")


class Settings(AdapterSettings):
    """Prompt length, and number of upper layers with a prompt."""

    method: Literal["llama_adapter"] = Field("llama_adapter", description="gated prompts in the upper layers")
    virtual_tokens: Dimension = Field(10, description="prompt length per layer")  # the paper, section 4.1
    layers: Dimension = Field(
        30, description="number of upper layers with a prompt; capped at all layers"
    )  # 30 of 32


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with gated prompts in its upper layers.

    Raises:
        UserError: PEFT's adaption prompt does not support the model type.
    """
    from peft import AdaptionPromptConfig, get_peft_model

    if model.config.model_type not in SUPPORTED_MODEL_TYPES:
        actual = f"'llama_adapter' on a model of type '{model.config.model_type}'"
        expected = f"a model of type {', '.join(SUPPORTED_MODEL_TYPES)}"
        raise UserError(
            Problem("adapter.method", actual, expected, "use adapter.method=prefix, which supports any model")
        )
    config = AdaptionPromptConfig(
        task_type=peft_task_type(model),
        adapter_len=settings.virtual_tokens,
        adapter_layers=min(settings.layers, model.config.num_hidden_layers),
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
