r"""DoRA: LoRA on a weight's direction, with a trained magnitude vector.

Liu et al. 2024 (arXiv 2402.09353), equation 5: W' = m (W + B A) / ||W + B A||_c, with ||.||_c the norm of
each column (of each output's weights, in PyTorch's layout) and m its trained magnitude. At initialization
it equals the base. The norm is a constant in the backward pass (section 4.3), as PEFT implements it; in the
authors' code this is the option ``dora_simple``.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters.traits import Traits

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# No int8: on an 8-bit base the norm in PEFT's DoRA raised an AttributeError (tested on a CPU).
TRAITS = Traits(quantization=("none", "nf4"), training_only=("dropout",))


class Settings(lora.Settings):
    """LoRA's settings; the paper's table 8 for LLaMA-7B: rank 16 or 32, alpha = 2 r, dropout 0.05."""

    method: Literal["dora"] = Field("dora", description="LoRA with a trained magnitude per output")  # type: ignore[assignment]


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with DoRA on its targets.

    Raises:
        UserError: a target matches no layer of this model.
    """
    return lora.with_lora(model, settings, use_dora=True)
