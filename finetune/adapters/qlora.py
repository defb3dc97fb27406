"""QLoRA: LoRA on a base stored in 4-bit NormalFloat with double quantization (or in 8 bits).

Dettmers et al. 2023 (arXiv 2305.14314), equation 5. The base is quantized while it is loaded; LoRA itself
stays in float32.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters.traits import Traits
from finetune.recipe.settings import Dimension, Fraction, PositiveFloat

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(quantization=("nf4", "int8"), training_only=("dropout",))


class Settings(lora.Settings):
    """LoRA's settings, with the QLoRA paper's values (appendix B.2; dropout 0.1 up to 13B, 0.05 above)."""

    method: Literal["qlora"] = Field("qlora", description="LoRA on a 4-bit base")  # type: ignore[assignment]
    rank: Dimension = Field(64, description="r: rank of the low-rank product")
    alpha: PositiveFloat = Field(16.0, description="scale: the product is multiplied by alpha / rank")
    dropout: Fraction = Field(0.1, description="dropout probability at the input of A")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the quantized base with LoRA on its targets.

    Raises:
        UserError: a target matches no layer of this model.
    """
    return lora.build(model, settings)
