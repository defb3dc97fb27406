r"""Bottleneck adapters: a small network after (sequential) or in parallel to the sublayers of each block.

``houlsby``: after attention and after the feed-forward layer, Houlsby et al. 2019 (arXiv 1902.00751),
figure 2: h <- h + f(h W_down) W_up. ``pfeiffer``: after the feed-forward layer only, Pfeiffer et al. 2020
(arXiv 2005.00247), section 3.2.2. ``parallel``: parallel to the feed-forward layer, He et al. 2021 (arXiv
2110.04366), equation 10 and table 6, "scaled parallel adapter": h <- FFN(x) + s f(x W_down) W_up, with s =
4.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters._targets import FEED_FORWARD_OUTPUT, find_module_names
from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import Traits
from finetune.recipe.settings import AdapterSettings, Dimension, PositiveFloat

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NONLINEAR_NOT_MERGEABLE = "a bottleneck is nonlinear and cannot be merged into base weights"
TRAITS = Traits(
    merge_unsupported=NONLINEAR_NOT_MERGEABLE, learning_rate=1e-3
)  # Houlsby et al., section 3.1: 3e-5 to 3e-3

ATTENTION_OUTPUT = ("o_proj", "out_proj", "dense", "wo", "c_proj")
FEED_FORWARD = ("mlp", "feed_forward", "ffn")

Placement = Literal["houlsby", "pfeiffer", "parallel"]


class Settings(AdapterSettings):
    """Placement, width, scale and activation of the bottlenecks."""

    method: Literal["bottleneck"] = Field("bottleneck", description="bottleneck networks in each block")
    # parallel: He et al., table 6: better than sequential at the same number of parameters.
    placement: Placement = Field(
        "parallel", description="after attention and FFN, after FFN, or parallel to FFN"
    )
    bottleneck_size: Dimension = Field(
        64, description="width of the bottleneck"
    )  # Houlsby et al.: 8, 64 or 256
    scale: PositiveFloat | None = Field(
        None, description="scale of its output; null: 4 for parallel (He et al.), else 1"
    )
    activation: Literal["relu", "gelu", "silu"] = Field(
        "relu", description="nonlinearity"
    )  # He et al., eq. 4


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with bottlenecks in every block.

    Raises:
        UserError: the layers have none of the known names.
    """
    from peft import get_peft_model

    from finetune.adapters._bottleneck_layer import BottleneckConfig

    parallel = settings.placement == "parallel"
    config = BottleneckConfig(
        task_type=peft_task_type(model),
        target_modules=target_module_names(model, settings.placement),
        hidden_size=model.config.hidden_size,
        width=settings.bottleneck_size,
        scale=settings.scale or (4.0 if parallel else 1.0),
        activation=settings.activation,
        parallel=parallel,
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model


def target_module_names(model: "PreTrainedModel", placement: Placement) -> list[str]:
    """Return the names of the target modules of a placement.

    Raises:
        UserError: the model has none of the known names.
    """
    if placement == "parallel":
        return find_module_names(model, FEED_FORWARD, part="the feed-forward block", linear=False)
    after_ffn = find_module_names(
        model, FEED_FORWARD_OUTPUT, part="the output layer of the feed-forward block"
    )
    if placement == "pfeiffer":
        return after_ffn
    return [*find_module_names(model, ATTENTION_OUTPUT, part="the output layer of attention"), *after_ffn]
