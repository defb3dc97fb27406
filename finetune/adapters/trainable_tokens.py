"""Trainable tokens: the embeddings of a few tokens are trained, all others are frozen.

For tokens that a base was not trained on: turn markers of a template, domain terms. The same idea as prompt
tuning (Lester et al. 2021, arXiv 2104.08691), but for tokens of the text itself; PEFT stores the trained rows
separately from the frozen embedding matrix.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import SCORE_HEAD_NOT_SAVED, Traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import AdapterSettings, NonEmptyStr, NonNegativeInt

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(scoring_unsupported=SCORE_HEAD_NOT_SAVED, learning_rate=1e-3)  # as for `prompt`


class Settings(AdapterSettings):
    """Tokens whose embeddings are trained."""

    method: Literal["trainable_tokens"] = Field("trainable_tokens", description="embeddings of a few tokens")
    tokens: Annotated[list[NonEmptyStr | NonNegativeInt], Field(min_length=1)] | None = Field(
        None, description="tokens (texts or ids); null: the tokenizer's special tokens"
    )


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base with a few trainable rows of its embeddings.

    Raises:
        UserError: a text is not a single token of the base, or an id is outside its vocabulary.
    """
    from peft import TrainableTokensConfig, get_peft_model

    ids = _trainable_token_ids(model, settings.tokens)
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    config = TrainableTokensConfig(task_type=peft_task_type(model), token_indices=ids, target_modules=[name])
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model


def _trainable_token_ids(model: "PreTrainedModel", tokens: list[str | int] | None) -> list[int]:
    if tokens is not None and all(isinstance(token, int) for token in tokens):
        ids = [int(token) for token in tokens]
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path, local_files_only=True)
        requested = tokenizer.all_special_tokens if tokens is None else tokens
        ids = [
            token_or_id if isinstance(token_or_id, int) else _single_token_id(tokenizer.encode, token_or_id)
            for token_or_id in requested
        ]
    vocab_size = model.get_input_embeddings().num_embeddings
    if any(token_id >= vocab_size for token_id in ids):
        actual = f"token id {max(ids)}, but the base has {vocab_size} embeddings"
        raise UserError(Problem("adapter.tokens", actual, "tokens of the base's vocabulary"))
    return sorted(set(ids))


def _single_token_id(encode: "Callable[..., list[int]]", text: str) -> int:
    ids = encode(text, add_special_tokens=False)
    if len(ids) != 1:
        actual = f"'{text}' is {len(ids)} tokens in this base's tokenizer"
        raise UserError(Problem("adapter.tokens", actual, "texts that are one token each, or ids"))
    return ids[0]
