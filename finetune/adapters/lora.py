r"""LoRA: a trainable low-rank product is added to each frozen weight W, h = W x + (alpha / r) B A x.

Hu et al. 2021 (arXiv 2106.09685), equation 3. A is r x in (Kaiming), B is out x r (zero), so at
initialization the model equals the base.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._targets import ALL_LINEAR, Target, resolve_targets
from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import Traits
from finetune.recipe.settings import AdapterSettings, Dimension, Fraction, PositiveFloat

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(training_only=("dropout",))


class Settings(AdapterSettings):
    """Rank, scale, dropout and target modules."""

    method: Literal["lora"] = Field("lora", description="low-rank product added to frozen weights")
    # Rank 16, alpha = 2 r: Biderman et al. 2024, "LoRA Learns Less and Forgets Less" (arXiv 2405.09673).
    rank: Dimension = Field(16, description="r: rank of the low-rank product")
    alpha: PositiveFloat = Field(32.0, description="scale: the product is multiplied by alpha / rank")
    # Dropout 0.05: tloen/alpaca-lora, finetune.py; QLoRA (arXiv 2305.14314, appendix B.2) above 13B.
    dropout: Fraction = Field(0.05, description="dropout probability at the input of A")
    # Every linear layer: QLoRA, figure 2: with fewer of them LoRA does not match full fine-tuning.
    target: Target = Field(
        ALL_LINEAR,
        description="names of the target layers; all-linear: every linear layer except the head",
    )


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with LoRA on its targets; nothing else is trainable.

    Raises:
        UserError: a target matches no layer of this model.
    """
    return with_lora(model, settings)


def with_lora(model: "PreTrainedModel", settings: Settings, **variant: bool | str) -> "PeftModel":
    """Return the base with LoRA or a variant of it; ``variant`` are further arguments of LoraConfig."""
    from peft import LoraConfig, get_peft_model

    target = resolve_targets(model, settings.target, lora=True)
    config = LoraConfig(
        task_type=peft_task_type(model),
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target,
        **variant,
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
