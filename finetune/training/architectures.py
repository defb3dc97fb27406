"""Architectures by config.json, before loading: which are no causal LM, and which cannot be packed."""

import inspect

from transformers import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CTC_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
)

from finetune.library_internals import has_recurrent_state
from finetune.recipe.errors import Problem, UserError

MASKABLE_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types that only read the mask; the last two within their window."""
MASKS_OF_TWO_AXES = ("openai-gpt",)
"""Types that fail with a mask of queries and keys (transformers 5.23, ``models/openai/``)."""
KINDS = (
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, "a model of images and text"),
    (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, "an image model"),
    (MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING, "an image model"),
    (MODEL_FOR_OBJECT_DETECTION_MAPPING, "an image model"),
    (MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, "a speech model"),
    (MODEL_FOR_CTC_MAPPING, "a speech model"),
    (MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING, "an audio model"),
    (MODEL_FOR_MASKED_LM_MAPPING, "an encoder, which attends to later tokens"),
)
"""What transformers has a config for, by its Auto classes; the first match is the description."""
OTHER_MODALITIES = {"vision_config", "audio_config"}
"""Sub-configs of models of images and audio. The text model inside is trained if it has a causal class."""
CAUSAL_LM_EXPECTED = "a causal (decoder-only) language model, such as Llama, Qwen, Mistral or GPT-NeoX"


def check_causal_architecture(config: PretrainedConfig, *, base: str) -> None:
    """Check that a config is that of a decoder-only language model.

    Raises:
        UserError: it is an encoder-decoder, an encoder, or a model of images or audio.
    """
    # A model with its own code declares its classes itself.
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    if reason := _not_causal_reason(config):
        actual = f"a model of type '{config.model_type}', {reason}"
        raise UserError(Problem(f"model.base '{base}'", actual, CAUSAL_LM_EXPECTED))


def _not_causal_reason(config: PretrainedConfig) -> str:
    # Also of families with a causal class for their decoder alone, such as BART: the checkpoint's decoder
    # attends to an encoder.
    if config.is_encoder_decoder:
        return "an encoder-decoder"
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        has_text_model = type(config.get_text_config()) in MODEL_FOR_CAUSAL_LM_MAPPING
        is_text_alone = not OTHER_MODALITIES & config.sub_configs.keys()
        if is_text_alone or (has_text_model and config.get_text_config() is not config):
            return ""
        return "a model of images and text, whose text model is no causal LM of its own"
    kinds = (description for mapping, description in KINDS if type(config) in mapping)
    return next(kinds, "which has no causal LM class in transformers")


def mask_unsupported(config: PretrainedConfig) -> str:
    """Return why a mask and position ids cannot separate texts in one row, in one line; "" if they can.

    It rules out packing, and completions that share their prompt.
    """
    return _architecture_reason(config) or _layer_reason(config)


def _architecture_reason(config: PretrainedConfig) -> str:
    if type(config) not in MODEL_MAPPING:
        return f"unknown architecture '{config.model_type}': it may not support a block mask"
    architecture = MODEL_MAPPING[type(config)]
    accepted = inspect.signature(architecture.forward).parameters
    if has_recurrent_state(architecture):
        return f"'{config.model_type}' has a recurrent state, which ignores the mask"
    if config.model_type in MASKS_OF_TWO_AXES:
        return f"'{config.model_type}' only accepts a mask of rows and tokens"
    if not {"attention_mask", "position_ids"} <= set(accepted):
        return f"'{config.model_type}' does not accept position_ids, which must restart for each text"
    return ""


def _layer_reason(config: PretrainedConfig) -> str:
    fields = config.get_text_config().to_dict()
    unsupported = sorted({*(fields.get("layer_types") or [])} - MASKABLE_LAYER_TYPES)
    if unsupported:
        return f"layers of type {', '.join(unsupported)} do not support a block mask"
    if fields.get("alibi"):
        return "ALiBi biases by distance in the row, across texts"
    if any("conv" in name for name in fields):
        return "convolutions mix neighboring tokens regardless of the mask"
    return ""
