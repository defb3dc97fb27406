"""What programs need to generate as the run did, besides weights: stop tokens and chat template."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import GENERATION_CONFIG_NAME

from data_templates.segments import Message, TemplateError
from finetune.data.chat_template import chat_template_text, export_chat_template
from finetune.data.tokens import Encoder
from finetune.recipe.bases import EMBEDDED_BASE
from finetune.recipe.command_line import COMMAND_LINE
from finetune.training.context import RunContext

COMPARED_CONVERSATIONS = (
    (Message("user", "a b"),),
    (Message("system", "s"), Message("user", "a b")),
    (Message("user", "a b"), Message("assistant", "c"), Message("user", "d")),
)
"""Prompts on which the base's chat template must give the tokens of the run's template."""


def save_inference_files(folder: Path, base: PreTrainedModel, encoder: Encoder) -> str:
    """Save tokenizer, chat template and generation config; return a note on the chat template, or "".

    The saved chat template is the run's template. Where that cannot be written as one, none is saved: replies
    to the base's would not be those that were trained.
    """
    template, note = trained_chat_template(encoder)
    tokenizer = encoder.tokenizer
    if template is not tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    if base.can_generate():
        with_stop_tokens(base.generation_config, encoder.stop_ids).to_json_file(
            folder / GENERATION_CONFIG_NAME
        )
    return note


class InferenceFiles(TrainerCallback):  # type: ignore[misc]
    """Saves tokenizer, chat template and generation config with every checkpoint."""

    def __init__(self, base: PreTrainedModel, encoder: Encoder) -> None:
        """Bind the callback to the model and the encoder of a run."""
        self.base, self.encoder = base, encoder

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the files into the new checkpoint."""
        save_inference_files(
            Path(args.output_dir) / f"checkpoint-{state.global_step}", self.base, self.encoder
        )


def with_stop_tokens(config: GenerationConfig, stop_ids: Sequence[int]) -> GenerationConfig:
    """Return a base's generation config with the run's stop tokens added to the base's own."""
    own = config.eos_token_id
    own_ids = [] if own is None else own if isinstance(own, list) else [own]
    ids = list(dict.fromkeys([*own_ids, *stop_ids]))
    config = copy.deepcopy(config)
    config.eos_token_id = ids if len(ids) > 1 else ids[0]
    return config


def trained_chat_template(encoder: Encoder) -> tuple[str | None, str]:
    """Return the chat template that renders what was trained (None: there is none), and a note for the user.

    The base's own is kept where it is the run's template: it may have more, such as tools.
    """
    own = encoder.tokenizer.chat_template
    has_defaults = encoder.system or encoder.template_options
    if own and encoder.name == "tokenizer" and not has_defaults:
        return own, ""
    if own and renders_run_template(encoder):
        return own, ""
    template = export_chat_template(encoder)
    if template is None:
        return None, (
            f"the run's template '{encoder.name}' cannot be written as a chat template: none is saved; "
            "`llm-align chat` uses the run's"
        )
    replaced = f"the run's template '{encoder.name}' is saved in place of the base's"
    return template, replaced if own and encoder.name != "tokenizer" else ""


def untrained_chat_template(ctx: RunContext, encoder: Encoder) -> list[str]:
    """Return a line for the user if a base that they chose has a chat template and another one is trained.

    A recipe's own base comes with its template, and a run that starts from another one has that run's.
    """
    is_chosen = ctx.recipe.origins["model.base"] == COMMAND_LINE or ctx.settings.model.base != EMBEDDED_BASE
    if ctx.settings.model.init_from is not None or not is_chosen:
        return []
    has_own = encoder.tokenizer.chat_template and encoder.name != "tokenizer"
    if not has_own or ctx.settings.data.text_format is not None or renders_run_template(encoder):
        return []
    return [
        f"this base has a chat template of its own, and the run trains '{encoder.name}': "
        "data.template=tokenizer trains the base's"
    ]


def renders_run_template(encoder: Encoder) -> bool:
    """Return whether the base's chat template gives the tokens of the run's template."""
    return all(
        _chat_template_ids(encoder, conversation) == _template_ids(encoder, conversation)
        for conversation in COMPARED_CONVERSATIONS
    )


def _template_ids(encoder: Encoder, conversation: Sequence[Message]) -> list[int] | None:
    """Return the ids of a prompt by the run's template; None if it refuses the conversation."""
    try:
        return encoder.encode_prompt(conversation)
    except TemplateError:
        return None


def _chat_template_ids(encoder: Encoder, conversation: Sequence[Message]) -> list[int] | None:
    """Return the ids of a prompt by the base's chat template; None if it refuses the conversation."""
    text = chat_template_text(encoder.tokenizer, conversation)
    return None if text is None else list(encoder.tokenizer(text, add_special_tokens=False).input_ids)
