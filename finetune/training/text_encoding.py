"""Tokenizer, chat template and maximum length of a run, from tokenizer and config (no model weights)."""

from dataclasses import dataclass

from finetune.data.tokens import Encoder
from finetune.recipe.settings import StageSettings
from finetune.training import auto_values
from finetune.training.model import context_length, load_tokenizer


@dataclass(frozen=True)
class TextEncoding:
    """Encoder, positions available for tokens, virtual tokens of the adapter, maximum tokens of a row."""

    encoder: Encoder
    context: int
    virtual_tokens: int
    max_length: int


def build_text_encoding(settings: StageSettings) -> tuple[TextEncoding, str]:
    """Load tokenizer and template; return them with the reason for ``max_length``.

    Raises:
        UserError: no such base, no EOS, no chat template, or ``max_length`` exceeds the model's positions.
    """
    virtual_tokens = settings.adapter.positions
    tokenizer = load_tokenizer(settings.model)
    encoder = Encoder(tokenizer, settings.data.template, system=settings.data.system_prompt)
    context = context_length(settings.model)
    max_length, reason = auto_values.max_length(
        settings.data.max_length, context=context, virtual_tokens=virtual_tokens
    )
    return TextEncoding(encoder, context - virtual_tokens, virtual_tokens, max_length), reason
