"""The text side of a run, from tokenizer and config alone: how conversations become tokens."""

from dataclasses import dataclass

from finetune.data.tokens import Encoder
from finetune.planning import choices
from finetune.recipe.settings import StageSettings
from finetune.training.model import context_length, load_tokenizer


@dataclass(frozen=True)
class Text:
    """How conversations become tokens: encoder, positions left, virtual tokens, tokens of a row at most."""

    encoder: Encoder
    context: int
    virtual_tokens: int
    max_length: int


def text_of(settings: StageSettings) -> tuple[Text, str]:
    """Load tokenizer and template; return them with the reason for ``max_length``.

    Raises:
        UserError: no such base, no EOS, no chat template, or more tokens a row than the model has positions.
    """
    virtual_tokens = settings.adapter.positions
    tokenizer = load_tokenizer(settings.model)
    encoder = Encoder(tokenizer, settings.data.template, system=settings.data.system)
    context = context_length(settings.model)
    max_length, reason = choices.max_length(
        settings.data.max_length, context=context, virtual_tokens=virtual_tokens
    )
    return Text(encoder, context - virtual_tokens, virtual_tokens, max_length), reason
