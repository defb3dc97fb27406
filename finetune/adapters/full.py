"""Full fine-tuning: every weight of the base is trained, and the result is a model of its own."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._traits import Traits
from finetune.recipe.settings import AdapterSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAITS = Traits(quantization=("none",), whole_model=True, learning_rate=2e-5)  # Stanford Alpaca, README: 7B


class Settings(AdapterSettings):
    """Full tuning has no settings of its own."""

    method: Literal["full"] = Field("full", description="train the base's own weights")


def build(model: "PreTrainedModel", settings: Settings) -> "PreTrainedModel":
    """Return the base itself, all of it trainable."""
    model.requires_grad_(True)
    return model
