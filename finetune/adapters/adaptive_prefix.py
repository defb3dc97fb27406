r"""Adaptive prefix tuning: a prefix with a gate per layer, and one per position of each layer.

Zhang et al. 2023 (arXiv 2305.15212), section 2.2: P_i' = lambda_i alpha_i * P_i, lambda_i a trained scale of
layer i, alpha_i in (0, 1) one gate per virtual token. The paper computes alpha_i from the states of the layer
below. In a causal model only the first token's state is visible to all positions, and it is the same in every
row; so alpha_i = sigmoid(a_i) with a_i trained. The gates are multiplied into the prefix when it is saved:
plain PEFT loads the result as a prefix adapter.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import prefix
from finetune.adapters.traits import VIRTUAL_TOKENS_NOT_MERGEABLE, Traits
from finetune.recipe.settings import Dimension, VirtualTokenSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    packing=False,
    gradient_checkpointing=False,
    merge_unsupported=VIRTUAL_TOKENS_NOT_MERGEABLE,
    learning_rate=5e-3,
)  # 5e-3: the paper's appendix, 5e-3 to 7e-3


class Settings(VirtualTokenSettings):
    """Length of the prefix."""

    method: Literal["adaptive_prefix"] = Field("adaptive_prefix", description="a prefix with trained gates")
    virtual_tokens: Dimension = Field(20, description="length of the prefix")  # as for `prefix`


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with a gated prefix, initialized from the keys and values of real tokens."""
    from finetune.adapters._prefix_encoders import GatedPrefix
    from finetune.adapters._prompt_model import prompt_model

    # Only for its initial values: the wrapper is discarded, and GatedPrefix replaces the encoder.
    prefix_model = prefix.build(model, prefix.Settings(virtual_tokens=settings.virtual_tokens))
    initial_prefix = prefix_model.prompt_encoder["default"].embedding.weight.detach()
    config = prefix_model.peft_config["default"]
    adapted = prompt_model(model, config)
    adapted.prompt_encoder["default"] = GatedPrefix(initial_prefix, layers=config.num_layers).to(
        initial_prefix.device
    )
    return adapted
