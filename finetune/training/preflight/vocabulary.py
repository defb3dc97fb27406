"""Checks that every token of the data has an embedding, and that those who never had one learn it."""

from collections.abc import Collection, Mapping

import numpy as np
from torch import Tensor

from finetune.recipe.errors import Problem
from finetune.training.preflight.ticks import Tick, failed, some


def embeddings_exist(
    used: Collection[int], embedding: Tensor, *, trained: bool, added: Mapping[str, int], num_tokens: int
) -> Tick:
    """Check that the model has a row for each token that the data uses, and that none of these is blank.

    Nothing is ever added to a vocabulary here: a marker that the tokenizer lacks is written with ordinary
    tokens. So a token without a row was added by somebody else, and its model was not resized with it.

    Args:
        used: the ids in the data, and the stop tokens.
        embedding: (rows, width), the input embeddings.
        trained: whether these learn in this run.
        added: the tokens that were added to the tokenizer, by text.
        num_tokens: size of the tokenizer.
    """
    rows = len(embedding)
    outside = sorted(token for token in used if token >= rows)
    if outside:
        texts = {token: text for text, token in added.items()}
        names = [texts.get(token, str(token)) for token in outside]
        found = f"{rows} embeddings for {num_tokens} tokens of the tokenizer; the data use {some(names)}"
        repair = (
            "take the tokenizer that belongs to this base, or save the base anew after "
            f"model.resize_token_embeddings({num_tokens}) and learn them with adapter.method=trainable_tokens"
        )
        return failed("vocabulary", Problem("model.base", found, "an embedding for every token", repair))
    blank = [text for text, token in added.items() if token in used and not embedding[token].any()]
    if blank and not trained:
        detail = (
            f"the base never learnt {some(blank)} (embeddings of zeros); adapter.method=trainable_tokens does"
        )
        return Tick("vocabulary", detail, warned=True)
    spare = "" if num_tokens <= rows else f"; {num_tokens - rows} further ones have none and are not used"
    return Tick("vocabulary", f"all {len(used)} tokens of the data have embeddings{spare}")


def used_tokens(ids: np.ndarray, stop_ids: Collection[int]) -> set[int]:
    """Return the ids that occur, and the stop tokens."""
    return {*np.flatnonzero(np.bincount(ids)).tolist(), *stop_ids}  # unique() would sort them all
