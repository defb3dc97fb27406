"""Prefix tuning: trained keys and values are prepended to the sequence in every attention layer.

Li and Liang 2021 (arXiv 2101.00190), equation 3: h_i = P[i] where i is in the prefix; the base stays
frozen. The prefix is initialized from the keys and values of real tokens (their section 7.4: far better than
random values, which disrupt the model before the first step). With an MLP (``projection``) it is initialized
at random.
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
    learning_rate=1e-3,
)  # huggingface/peft, method_comparison


class Settings(VirtualTokenSettings):
    """Length of the prefix, and whether an MLP produces it."""

    method: Literal["prefix"] = Field("prefix", description="trained keys and values before every sequence")
    # 20: between the lengths that the paper found best, 10 (table to text) and 200 (summaries); section 7.2.
    virtual_tokens: Dimension = Field(20, description="length of the prefix")
    projection: bool = Field(
        False, description="produce the prefix with an MLP (the paper's reparameterization)"
    )


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with a trainable prefix of keys and values per layer."""
    import torch
    from peft import PrefixTuningConfig, get_peft_model, initialize_kv_prefix_from_past_key_values

    from finetune.adapters._prompt_model import prompt_model
    from finetune.distributed.sharding import gather_on_forward

    config = PrefixTuningConfig(
        task_type=peft_task_type(model),
        num_virtual_tokens=settings.virtual_tokens,
        prefix_projection=settings.projection,
    )
    if settings.projection:
        return prompt_model(model, config)
    token_ids = torch.randint(model.config.vocab_size, (1, settings.virtual_tokens))
    if model.config.bos_token_id is not None:
        token_ids[0, 0] = model.config.bos_token_id  # models attend strongly to the first token
    # Before get_peft_model: the base alone, without a prefix of its own.
    with torch.no_grad(), gather_on_forward(model):
        kv_cache = model(input_ids=token_ids.to(model.device), use_cache=True).past_key_values
    peft_model: PeftModel = get_peft_model(model, config)
    initialize_kv_prefix_from_past_key_values(peft_model, past_key_values=kv_cache)
    return peft_model
