r"""PiSSA: LoRA initialized to the principal components of each weight, on a base with the residual.

Meng et al. 2024 (arXiv 2404.02948), equations 2 to 4: W = U S V^T; A and B take the r largest singular
values, A = S_r^(1/2) V_r^T, B = U_r S_r^(1/2); the frozen base becomes W_res = W - B A. Their sum is W at
initialization. So the base in memory differs from the one on disk; PEFT recomputes it from the same
decomposition when it loads the adapter.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters.traits import Traits
from finetune.recipe.settings import Fraction, PositiveFloat

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    quantization=("none",), changes_base=True, learning_rate=2e-5, training_only=("dropout",)
)  # the paper's appendix: 2e-5


class Settings(lora.Settings):
    """LoRA's settings; alpha = r, so that base and product sum to W (the paper, section 5)."""

    method: Literal["pissa"] = Field("pissa", description="LoRA initialized to the largest singular values")  # type: ignore[assignment]
    alpha: PositiveFloat = Field(16.0, description="scale: the product is multiplied by alpha / rank")
    dropout: Fraction = Field(0.0, description="dropout probability at the input of A")  # the paper: 0


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with its principal components moved into a trainable product.

    Raises:
        UserError: a target matches no layer of this model.
    """
    return lora.with_lora(model, settings, init_lora_weights="pissa")
