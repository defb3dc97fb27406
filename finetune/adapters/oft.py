r"""OFT: each weight is multiplied by a trained block-diagonal rotation, preserving angles between neurons.

Qiu et al. 2023 (arXiv 2306.07280), equation 5: W' = R W with R orthogonal and block-diagonal, R = (I + Q)
(I - Q)^-1 (Cayley) of a trained skew-symmetric Q, initialized to zero; the exact Cayley transform, no
series. On a quantized base this is QOFT (arXiv 2506.19847).
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._targets import ALL_LINEAR, Target, resolve_targets
from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import Traits
from finetune.recipe.settings import AdapterSettings, Dimension, Fraction

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(learning_rate=4e-4, training_only=("dropout",))  # arXiv 2506.19847, table of hyper-parameters


class Settings(AdapterSettings):
    """Block size, dropout and target modules."""

    method: Literal["oft"] = Field("oft", description="trained rotations of frozen weights")
    block_size: Dimension = Field(
        32, description="block size; adjusted to divide each layer's input size"
    )  # PEFT
    dropout: Fraction = Field(
        0.0, description="probability that a block is not rotated during training"
    )  # PEFT's default
    target: Target = Field(ALL_LINEAR, description="names of the target layers")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with rotations on its targets.

    Raises:
        UserError: a target matches no layer of this model.
    """
    from peft import OFTConfig, get_peft_model

    target = resolve_targets(model, settings.target)
    config = OFTConfig(
        task_type=peft_task_type(model),
        oft_block_size=settings.block_size,
        module_dropout=settings.dropout,
        target_modules=target,
        # PEFT's default approximates the inverse by a few terms of a series, and R is not exactly orthogonal.
        use_cayley_neumann=False,
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
