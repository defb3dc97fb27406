"""P-tuning v2: deep prompts, i.e. prefix tuning without an MLP and with random initialization.

Liu et al. 2021 (arXiv 2110.07602), section 3: trained vectors are prepended to the keys and values of every
layer. For a causal language model this is the same function as prefix tuning (Li and Liang 2021). P-tuning v2
has no reparameterization and random initialization, where our ``prefix`` starts from real tokens; its other
ideas (a classification head, multi-task training first) concern tasks other than text generation. The saved
adapter has PEFT type PREFIX_TUNING, like that of ``prefix``.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import VIRTUAL_TOKENS_NOT_MERGEABLE, Traits
from finetune.recipe.settings import Dimension, VirtualTokenSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    packing=False,
    gradient_checkpointing=False,
    merge_unsupported=VIRTUAL_TOKENS_NOT_MERGEABLE,
    learning_rate=5e-3,
)  # the authors' scripts


class Settings(VirtualTokenSettings):
    """Length of the deep prompt."""

    method: Literal["ptuning_v2"] = Field(
        "ptuning_v2", description="deep prompts: a randomly initialized prefix"
    )
    # 20: the paper, figure 3: simple tasks need less than 20, hard ones about 100.
    virtual_tokens: Dimension = Field(20, description="length of the deep prompt")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with trainable keys and values per layer before every sequence."""
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type=peft_task_type(model), num_virtual_tokens=settings.virtual_tokens)
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
