"""Full fine-tuning: every weight of the base is trained; the result is a full model."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters.traits import Traits
from finetune.recipe.settings import AdapterSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAITS = Traits(
    quantization=("none",), full_finetuning=True, learning_rate=2e-5
)  # Stanford Alpaca, README: 7B


class Settings(AdapterSettings):
    """Full fine-tuning has no further settings."""

    method: Literal["full"] = Field("full", description="full fine-tuning of the base weights")


def build(model: "PreTrainedModel", settings: Settings) -> "PreTrainedModel":
    """Return the base with all weights trainable."""
    model.requires_grad_(True)
    return model
