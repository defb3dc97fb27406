r"""(IA)^3: trained vectors scale keys, values and the inner activations of the feed-forward layer.

Liu et al. 2022 (arXiv 2205.05638), equations 3 and 4: softmax(Q (l_k K)^T / sqrt(d)) (l_v V) and
(l_ff gamma(W_1 x)) W_2. The vectors are initialized to one.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._targets import FEED_FORWARD_OUTPUT, module_names
from finetune.adapters._task import task_of
from finetune.adapters._traits import Traits
from finetune.recipe.settings import AdapterSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(learning_rate=3e-3)  # the paper, section 3.5

KEYS_AND_VALUES = ("k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn", "Wqkv")


class Settings(AdapterSettings):
    """(IA)^3 has no further settings: the paper fixes where the vectors act."""

    method: Literal["ia3"] = Field("ia3", description="vectors that scale keys, values and FFN activations")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with (IA)^3; a fused query-key-value layer is scaled as a whole.

    Raises:
        UserError: the layers have none of the known names.
    """
    from peft import IA3Config, get_peft_model

    attention = module_names(model, KEYS_AND_VALUES, what="the key and value projections")
    inner = module_names(model, FEED_FORWARD_OUTPUT, what="the output layer of the feed-forward block")
    config = IA3Config(
        task_type=task_of(model), target_modules=[*attention, *inner], feedforward_modules=inner
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
