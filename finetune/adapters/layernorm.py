"""LayerNorm tuning: only copies of the norm layers' weights (and biases) are trained.

Zhao et al. 2023 (arXiv 2312.11420), section 3: tuning only the norms of the attention blocks comes close to
LoRA on multi-modal instruction tuning.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._targets import norm_module_names
from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import Traits
from finetune.recipe.settings import AdapterSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(learning_rate=1e-3)  # the paper, section 4: larger than for full tuning


class Settings(AdapterSettings):
    """LayerNorm tuning has no further settings."""

    method: Literal["layernorm"] = Field("layernorm", description="weights and biases of the norm layers")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with a trainable copy of every norm layer.

    Raises:
        UserError: the model has no norm layer with weights.
    """
    from peft import LNTuningConfig, get_peft_model

    config = LNTuningConfig(task_type=peft_task_type(model), target_modules=norm_module_names(model))
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
