"""What programs need to generate as the run did, besides weights: stop tokens and chat template."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError as JinjaError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from data_templates.segments import Message, TemplateError
from finetune.data.tokens import Encoder

COMPARED_CONVERSATIONS = (
    (Message("user", "a b"),),
    (Message("system", "s"), Message("user", "a b")),
    (Message("user", "a b"), Message("assistant", "c"), Message("user", "d")),
)
"""Prompts on which the base's chat template must give the tokens of the run's template."""


def save_inference_files(folder: Path, base: PreTrainedModel, encoder: Encoder) -> str:
    """Save tokenizer, chat template and generation config; return why a chat template is left out, or "".

    A chat template of the base that renders other text than the run's template is left out: replies to it
    would not be those that were trained.
    """
    reason = chat_template_mismatch(encoder)
    tokenizer = encoder.tokenizer
    if reason:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = None
    tokenizer.save_pretrained(str(folder))
    if base.can_generate():
        with_stop_tokens(base.generation_config, encoder.stop_ids).to_json_file(
            folder / GENERATION_CONFIG_NAME
        )
    return reason


def with_stop_tokens(config: GenerationConfig, stop_ids: Sequence[int]) -> GenerationConfig:
    """Return a base's generation config with the run's stop tokens added to the base's own."""
    own = config.eos_token_id
    own_ids = [] if own is None else own if isinstance(own, list) else [own]
    ids = list(dict.fromkeys([*own_ids, *stop_ids]))
    config = copy.deepcopy(config)
    config.eos_token_id = ids if len(ids) > 1 else ids[0]
    return config


def chat_template_mismatch(encoder: Encoder) -> str:
    """Return why the base's chat template is not the run's template; "" if it is, or if there is none."""
    if encoder.name == "tokenizer" or not encoder.tokenizer.chat_template:
        return ""
    for conversation in COMPARED_CONVERSATIONS:
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
        if _chat_template_ids(encoder, messages) != _template_ids(encoder, conversation):
            return (
                f"the base's chat template is not the run's template '{encoder.name}': saved without one; "
                "`llm-align chat` uses the run's"
            )
    return ""


def _template_ids(encoder: Encoder, conversation: Sequence[Message]) -> list[int] | None:
    """Return the ids of a prompt by the run's template; None if it refuses the conversation."""
    try:
        return encoder.encode_prompt(conversation)
    except TemplateError:
        return None


def _chat_template_ids(encoder: Encoder, messages: list[dict[str, Any]]) -> list[int] | None:
    """Return the ids of a prompt by the base's chat template; None if it refuses the conversation."""
    try:
        text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except JinjaError:
        return None
    return list(encoder.tokenizer(str(text), add_special_tokens=False).input_ids)
