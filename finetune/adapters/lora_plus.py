r"""LoRA+: LoRA with a higher learning rate for B than for A.

Hayou et al. 2024 (arXiv 2402.12354), section 4: the learning rate of B is lambda times that of A, lambda >>
1; ``train.learning_rate`` is that of A.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters.traits import Hooks, Traits

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    engines=("native",), learning_rate=2e-5, training_only=("dropout", "lr_ratio")
)  # the paper, table of LLaMA-7B: A at 2e-5


class Settings(lora.Settings):
    """LoRA's settings, and the learning rate ratio of B to A."""

    method: Literal["lora_plus"] = Field("lora_plus", description="LoRA with a higher learning rate for B")  # type: ignore[assignment]
    # 16: the ratio that the paper recommends (about 2^4).
    lr_ratio: Annotated[float, Field(ge=1, le=1000)] = Field(
        16.0, description="learning rate of B divided by that of A (PEFT: loraplus_lr_ratio)"
    )


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with LoRA on its targets.

    Raises:
        UserError: a target matches no layer of this model.
    """
    return lora.with_lora(model, settings)


def hooks(model: "PeftModel", settings: Settings, *, steps: int) -> Hooks:
    """Return the hooks: the LoRA+ learning rate factor of each B."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_B." in name]
    return Hooks(lr_factors=dict.fromkeys(names, settings.lr_ratio))
