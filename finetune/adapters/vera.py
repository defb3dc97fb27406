r"""VeRA: two random matrices, frozen and shared by all layers; each layer trains two vectors that scale them.

Kopiczko et al. 2023 (arXiv 2310.11454), equation 2: h = W x + Lambda_b B Lambda_d A x, with b
initialized to 0. The random matrices are saved with the vectors.
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

TRAITS = Traits(learning_rate=4e-3, training_only=("dropout",))  # the paper, table 9: LLaMA on instructions


class Settings(AdapterSettings):
    """Rank of the shared matrices, initial value of d, dropout and target modules."""

    method: Literal["vera"] = Field("vera", description="vectors that scale shared random matrices")
    rank: Dimension = Field(256, description="r: rank of the shared random matrices")  # the paper, table 9
    d_initial: PositiveFloat = Field(0.1, description="initial value of d")  # the paper, table 6
    dropout: Fraction = Field(0.0, description="dropout probability at the inputs")  # the paper, table 9
    target: Target = Field(ALL_LINEAR, description="names of the target layers")  # the paper: all linear


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with VeRA on its targets.

    Raises:
        UserError: a target matches no layer of this model.
    """
    from peft import VeraConfig, get_peft_model

    target = resolve_targets(model, settings.target)
    config = VeraConfig(
        task_type=peft_task_type(model),
        r=settings.rank,
        d_initial=settings.d_initial,
        vera_dropout=settings.dropout,
        target_modules=target,
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
