r"""LoRA: a frozen weight W gets a trainable product of low rank, h = W x + (alpha / r) B A x.

Hu et al. 2021 (arXiv 2106.09685), equation 3. A is r x in (Kaiming), B is out x r (zero), so the first step starts at the base.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from finetune.adapters._targets import ALL_LINEAR, check_targets
from finetune.adapters._traits import Traits
from finetune.recipe.settings import AdapterSettings, Positive, Share

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits()


class Settings(AdapterSettings):
    """Rank, scale and place of the low-rank product."""

    method: Literal["lora"] = Field("lora", description="low-rank product beside frozen weights")
    rank: Positive = Field(16, description="r: columns of the low-rank product")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="scale: the product counts alpha / rank times")
    dropout: Share = Field(0.05, description="share of inputs dropped before A, in training")
    target: Literal["all-linear"] | list[str] = Field(
        ALL_LINEAR, description="module names that get an adapter, or all-linear (every linear layer but the head)"
    )


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with LoRA on its targets, nothing else trainable.

    Raises:
        UserError: a target names no linear layer of this model.
    """
    return add_lora(model, settings)


def add_lora(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Put LoRA beside the targets of a base, quantized or not."""
    from peft import LoraConfig, get_peft_model

    check_targets(model, settings.target)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target,
    )
    peft_model = get_peft_model(model, config)
    return peft_model
