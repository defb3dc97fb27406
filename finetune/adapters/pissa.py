r"""PiSSA: LoRA that starts as the principal part of each weight, over a base that keeps the rest.

Meng et al. 2024 (arXiv 2404.02948), equations 2 to 4: W = U S V^T; A and B take the r largest singular
values, A = S_r^(1/2) V_r^T, B = U_r S_r^(1/2); the frozen base becomes W_res = W - B A. The sum is W at the
start. The base in memory is therefore another one than on the disk; PEFT computes it again when it loads the
adapter, from the same decomposition.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters._traits import Traits
from finetune.recipe.settings import Share

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    quantization=("none",), changes_base=True, learning_rate=2e-5, in_training=("dropout",)
)  # the paper's appendix: 2e-5


class Settings(lora.Settings):
    """LoRA's settings; alpha = r, so that base and product add up to W (the paper, section 5)."""

    method: Literal["pissa"] = Field("pissa", description="LoRA from the largest singular values")  # type: ignore[assignment]
    alpha: lora.Alpha = Field(16.0, description="scale: the product counts alpha / rank times")
    dropout: Share = Field(0.0, description="share of inputs dropped before A, in training")  # the paper: 0


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with its principal part moved into a trainable product.

    Raises:
        UserError: a target names no layer of this model.
    """
    return lora.with_lora(model, settings, init_lora_weights="pissa")
