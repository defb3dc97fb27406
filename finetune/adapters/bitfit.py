"""BitFit: only the bias terms are trained.

Ben Zaken et al. 2021 (arXiv 2106.10199), section 3. The base's biases stay frozen: an offset of each bias is
trained, initialized to zero; merging adds it to the bias.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import Traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import AdapterSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(learning_rate=1e-3)  # the paper, appendix A.2: 1e-4 to 1e-2


class Settings(AdapterSettings):
    """BitFit has no further settings: every bias is trained."""

    method: Literal["bitfit"] = Field("bitfit", description="the bias terms of the base")


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with trainable bias offsets.

    Raises:
        UserError: the base has no bias terms.
    """
    from peft import get_peft_model

    from finetune.adapters._bias_layer import BitFitConfig

    names = [
        name
        for name, module in model.named_modules()
        if "bias" in dict(module.named_parameters(recurse=False))
        and module is not model.get_output_embeddings()
    ]
    if not names:
        actual = (
            f"'bitfit', but {type(model).__name__} has no bias terms (Llama, Mistral and Qwen3 have none)"
        )
        repair = "use adapter.method=ia3 or layernorm, which train as few parameters"
        raise UserError(
            Problem("adapter.method", actual, "a base with biases (GPT-NeoX, Qwen2, ...)", repair)
        )
    config = BitFitConfig(task_type=peft_task_type(model), target_modules=names)
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model
