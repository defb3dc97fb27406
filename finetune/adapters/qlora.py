"""QLoRA: LoRA over a base stored in 4-bit NormalFloat with double quantization (or in 8 bits).

Dettmers et al. 2023 (arXiv 2305.14314), equation 5. The base is quantized while it is loaded; LoRA itself stays in float32.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters._traits import Traits
from finetune.recipe.settings import Share

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(quantization=("nf4", "int8"))


class Settings(lora.Settings):
    """LoRA's settings, with the QLoRA paper's defaults (appendix B.2: r = 64, alpha = 16, dropout 0.1 up to 13B)."""

    method: Literal["qlora"] = Field("qlora", description="LoRA over a 4-bit base")  # type: ignore[assignment]
    rank: int = Field(64, gt=0, description="r: columns of the low-rank product")
    alpha: float = Field(16.0, gt=0, description="scale: the product counts alpha / rank times")
    dropout: Share = Field(0.1, description="share of inputs dropped before A, in training")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the quantized base with LoRA on its targets.

    Raises:
        UserError: a target names no linear layer of this model.
    """
    return lora.add_lora(model, settings)
