r"""VeRA: two random matrices, frozen and shared by all layers; each layer trains two vectors that scale them.

Kopiczko et al. 2023 (arXiv 2310.11454), equation 2: h = W x + Lambda_b B Lambda_d A x, with b = 0 at the
start. The random matrices are saved beside the vectors.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from finetune.adapters._targets import ALL_LINEAR, Target, check_targets
from finetune.adapters._task import task_of
from finetune.adapters._traits import Traits
from finetune.recipe.settings import AdapterSettings, Positive, Share

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(learning_rate=4e-3, in_training=("dropout",))  # the paper, table 9: LLaMA on instructions


class Settings(AdapterSettings):
    """Rank of the shared matrices, start of the inner scale, place."""

    method: Literal["vera"] = Field("vera", description="vectors that scale shared random matrices")
    rank: Positive = Field(256, description="r: rank of the shared random matrices")  # the paper, table 9
    start: Annotated[float, Field(gt=0)] = Field(0.1, description="first value of d")  # the paper, table 6
    dropout: Share = Field(0.0, description="share of inputs dropped, in training")  # the paper, table 9
    target: Target = Field(
        ALL_LINEAR, description="names of layers that get an adapter"
    )  # the paper: all linear


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with VeRA on its targets.

    Raises:
        UserError: a target names no layer of this model.
    """
    from peft import VeraConfig, get_peft_model

    check_targets(model, settings.target)
    config = VeraConfig(
        task_type=task_of(model),
        r=settings.rank,
        d_initial=settings.start,
        vera_dropout=settings.dropout,
        target_modules=settings.target,
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
