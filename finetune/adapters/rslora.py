r"""Rank-stabilized LoRA: the product is scaled by alpha / sqrt(r), so that high ranks train well.

Kalajdzievski 2023 (arXiv 2312.03732), theorem 3.2: h = W x + (alpha / sqrt(r)) B A x.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters.traits import Traits
from finetune.recipe.settings import Dimension, PositiveFloat

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(training_only=("dropout",))


class Settings(lora.Settings):
    """LoRA's settings, at a rank where the scale matters."""

    method: Literal["rslora"] = Field("rslora", description="LoRA scaled by alpha / sqrt(rank)")  # type: ignore[assignment]
    # 64: a rank where the scale matters; the paper tries 4 to 2048.
    rank: Dimension = Field(64, description="r: rank of the low-rank product")
    # 16: the paper's section 4.
    alpha: PositiveFloat = Field(16.0, description="scale: the product is multiplied by alpha / sqrt(rank)")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with LoRA on its targets, scaled by alpha / sqrt(rank).

    Raises:
        UserError: a target matches no layer of this model.
    """
    return lora.with_lora(model, settings, use_rslora=True)
