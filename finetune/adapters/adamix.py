r"""AdaMix: a mixture of bottlenecks; training samples one at random, inference averages their weights.

Wang et al. 2022 (arXiv 2205.12410). Section 3.2, stochastic routing: every forward pass samples a down
and an up projection in each block. Section 3.3, consistency: two forward passes per batch, and the loss is
equation 5, -log p_A(y | x) + 1/2 (KL(p_A || p_B) + KL(p_B || p_A)). Section 3.4, merging: W = 1/M sum_i W_i.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._task import peft_task_type
from finetune.adapters.bottleneck import NONLINEAR_NOT_MERGEABLE, target_module_names
from finetune.adapters.traits import Hooks, Traits
from finetune.recipe.settings import AdapterSettings, AtLeastTwo, Dimension

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    merge_unsupported=NONLINEAR_NOT_MERGEABLE,
    engines=("native",),
    learning_rate=1e-3,
    training_only=("consistency",),
)  # as for `bottleneck`


class Settings(AdapterSettings):
    """Width and number of the bottlenecks."""

    method: Literal["adamix"] = Field(
        "adamix", description="a mixture of bottlenecks, averaged after training"
    )
    bottleneck_size: Dimension = Field(
        16, description="width of each bottleneck"
    )  # the paper, section 4.1: 16 or 48
    experts: AtLeastTwo = Field(4, description="bottlenecks in the mixture")  # section 4.1
    consistency: bool = Field(
        True, description="two forward passes per batch with a consistency loss (equation 5)"
    )


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with a mixture of bottlenecks after every feed-forward layer.

    Raises:
        UserError: the layers have none of the known names.
    """
    from peft import get_peft_model

    from finetune.adapters._bottleneck_layer import BottleneckConfig

    config = BottleneckConfig(
        task_type=peft_task_type(model),
        target_modules=target_module_names(model, "pfeiffer"),
        hidden_size=model.config.hidden_size,
        width=settings.bottleneck_size,
        experts=settings.experts,
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model


def hooks(model: "PeftModel", settings: Settings, *, steps: int) -> Hooks:
    """Return the hooks: two forward passes per batch if ``consistency`` is set."""
    return Hooks(forward_passes=2 if settings.consistency else 1)
