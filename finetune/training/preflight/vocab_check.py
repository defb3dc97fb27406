"""Vocabulary check: every token of the data has an embedding, and no zero embedding stays frozen."""

from collections.abc import Collection, Mapping

import numpy as np
from torch import Tensor

from finetune.recipe.errors import Problem
from finetune.training.preflight.checks import CheckResult, failed, first_few


def check_vocab_size(
    used_ids: Collection[int], embedding: Tensor, *, trained: bool, added: Mapping[str, int], num_tokens: int
) -> CheckResult:
    """Check that each token of the data has an embedding, and that none of these is zero and frozen.

    Args:
        used_ids: the token ids in the data, and the stop tokens.
        embedding: (rows, D), the input embeddings.
        trained: whether the embeddings are trained in this run.
        added: text -> id of the tokens that were added to the tokenizer.
        num_tokens: size of the tokenizer.
    """
    # We never add tokens (a marker that the tokenizer lacks is written with ordinary tokens): a token without
    # an embedding was added by somebody else, without resizing the model.
    rows = len(embedding)
    missing = sorted(token for token in used_ids if token >= rows)
    if missing:
        texts = {token: text for text, token in added.items()}
        names = [texts.get(token, str(token)) for token in missing]
        actual = (
            f"{rows} embeddings for {num_tokens} tokens of the tokenizer; the data use {first_few(names)}"
        )
        repair = (
            "use the tokenizer of this base, or save the base again after "
            f"model.resize_token_embeddings({num_tokens}) and train them with adapter.method=trainable_tokens"
        )
        return failed("vocabulary", Problem("model.base", actual, "an embedding for every token", repair))
    zero_rows = [text for text, token in added.items() if token in used_ids and not embedding[token].any()]
    if zero_rows and not trained:
        repair = "adapter.method=trainable_tokens trains them"
        detail = f"the base's embeddings of {first_few(zero_rows)} are zero; {repair}"
        return CheckResult("vocabulary", detail, warned=True)
    unused = "" if num_tokens <= rows else f"; {num_tokens - rows} unused tokens have none"
    return CheckResult("vocabulary", f"all {len(used_ids)} tokens of the data have embeddings{unused}")


def used_tokens(ids: np.ndarray, stop_ids: Collection[int]) -> set[int]:
    """Return the set of token ids in the data, and the stop tokens."""
    return {*np.flatnonzero(np.bincount(ids)).tolist(), *stop_ids}  # np.unique would sort all tokens
