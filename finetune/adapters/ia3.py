r"""(IA)^3: trained vectors scale keys, values and the inner activations of the feed-forward layer.

Liu et al. 2022 (arXiv 2205.05638), equations 3 and 4: softmax(Q (l_k K)^T / sqrt(d)) (l_v V) and
(l_ff gamma(W_1 x)) W_2. The vectors are initialized to one.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._targets import FEED_FORWARD_OUTPUT, find_module_names
from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import Traits
from finetune.recipe.settings import AdapterSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(learning_rate=3e-3)  # the paper, section 3.5

KEY_VALUE_MODULES = ("k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn", "Wqkv")


class Settings(AdapterSettings):
    """(IA)^3 has no further settings: the paper fixes where the vectors act."""

    method: Literal["ia3"] = Field("ia3", description="vectors that scale keys, values and FFN activations")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with (IA)^3; a fused query-key-value layer is scaled as a whole.

    Raises:
        UserError: the layers have none of the known names.
    """
    from peft import IA3Config, get_peft_model

    key_value_names = find_module_names(model, KEY_VALUE_MODULES, part="the key and value projections")
    feedforward_names = find_module_names(
        model, FEED_FORWARD_OUTPUT, part="the output layer of the feed-forward block"
    )
    config = IA3Config(
        task_type=peft_task_type(model),
        target_modules=[*key_value_names, *feedforward_names],
        feedforward_modules=feedforward_names,
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
