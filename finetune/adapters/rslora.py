r"""Rank-stabilised LoRA: the product counts alpha / sqrt(r) times, so that high ranks learn as well.

Kalajdzievski 2023 (arXiv 2312.03732), theorem 3.2: h = W x + (alpha / sqrt(r)) B A x.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters._traits import Traits
from finetune.recipe.settings import Positive

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(in_training=("dropout",))


class Settings(lora.Settings):
    """LoRA's settings, at a rank where the scale matters."""

    method: Literal["rslora"] = Field("rslora", description="LoRA scaled by the root of its rank")  # type: ignore[assignment]
    # 64: a rank where the scale matters; the paper tries 4 to 2048.
    rank: Positive = Field(64, description="r: columns of the low-rank product")
    # 16: the paper's section 4.
    alpha: lora.Alpha = Field(16.0, description="scale: the product counts alpha / sqrt(rank) times")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with LoRA on its targets, scaled by alpha / sqrt(rank).

    Raises:
        UserError: a target names no layer of this model.
    """
    return lora.with_lora(model, settings, use_rslora=True)
