"""P-tuning: a small network produces the embeddings that are prepended to the input embeddings.

Liu et al. 2021 (arXiv 2103.10385), equation 5: h_i = MLP([LSTM(h_0:i), LSTM(h_i:m)]), or an MLP alone. After
training only the embeddings that the network produces are needed: the saved adapter has those.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import VIRTUAL_TOKENS_NOT_MERGEABLE, Traits
from finetune.recipe.settings import Dimension, VirtualTokenSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    packing=False, merge_unsupported=VIRTUAL_TOKENS_NOT_MERGEABLE, learning_rate=1e-3
)  # huggingface/peft, method_comparison


class Settings(VirtualTokenSettings):
    """Length of the prompt, and the network that produces it."""

    method: Literal["ptuning"] = Field(
        "ptuning", description="embeddings before every sequence, produced by a network"
    )
    virtual_tokens: Dimension = Field(20, description="length of the prompt")  # as for `prompt`
    encoder: Literal["mlp", "lstm"] = Field(
        "mlp", description="network: MLP, or LSTM with an MLP (the paper)"
    )
    encoder_hidden_size: Dimension = Field(
        128, description="width of the network"
    )  # PEFT's guide to P-tuning


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with a network that produces a soft prompt."""
    from peft import PromptEncoderConfig

    from finetune.adapters._prompt_model import prompt_model

    config = PromptEncoderConfig(
        task_type=peft_task_type(model),
        num_virtual_tokens=settings.virtual_tokens,
        encoder_reparameterization_type=settings.encoder.upper(),
        encoder_hidden_size=settings.encoder_hidden_size,
    )
    return prompt_model(model, config)
