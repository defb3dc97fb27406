"""What a tokenizer does to a text: its special tokens, BOS, normalizations, spaces; found by tokenizing."""

import json
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.recipe.errors import Problem, UserError

ANCHORS = ("\n", "\t", "。", "|")
"""Prefixes for encoding a span with tokenizers that add a space to every text, in order of preference."""

NORMALIZATIONS: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda text: unicodedata.normalize("NFKC", text), "ＵＳＥＲ："),
    (lambda text: text.replace("▁", " "), "a▁b"),
)
"""Normalizations that some tokenizers apply first, each with a probe text (fullwidth marks become ASCII)."""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens: named ones, and those only flagged as special (``<|start_header_id|>``)."""
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *marked})


def convert_to_ids(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> dict[str, int]:
    return {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}


def tokenize_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # Templates place BOS and EOS themselves. verbose=False: long rows are truncated or dropped later.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def tokenizes_equally(tokenizer: PreTrainedTokenizerBase, text: str, other: str) -> bool:
    first, second = tokenize_batch(tokenizer, [text, other])
    # Two unknown texts have equal ids too, which proves no normalization.
    return first == second and tokenizer.unk_token_id not in first


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS id if this tokenizer adds it to a text by itself, else None."""
    # Tested on a text, since a tokenizer may define a BOS and not add it.
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def find_anchors(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Return the prefixes for spans inside a sequence, each with its token ids.

    SentencePiece-style tokenizers add a space in front of every text they encode, but not after other text.

    Raises:
        UserError: the tokenizer merges every prefix with what follows, so that no span can be tokenized by
            itself.
    """
    [plain] = tokenize_batch(tokenizer, ["a"])
    if not tokenizer.convert_ids_to_tokens(plain)[0].startswith("▁"):
        return [("", [])]
    anchor_ids = tokenize_batch(tokenizer, list(ANCHORS))
    joined_ids = tokenize_batch(tokenizer, [f"{anchor}a" for anchor in ANCHORS])
    # The anchor keeps its own tokens, and the text after it gets no additional space.
    usable = [
        (anchor, head)
        for anchor, head, joined in zip(ANCHORS, anchor_ids, joined_ids, strict=True)
        if joined[: len(head)] == head
        and not tokenizer.convert_ids_to_tokens(joined)[len(head)].startswith("▁")
    ]
    if not usable:
        actual = "the tokenizer merges a line feed with the text after it"
        raise UserError(
            Problem("model.base", actual, "a tokenizer that can encode a piece of text independently")
        )
    return usable


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return everything that determines a tokenizer's output, as JSON-serializable data."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        return [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), added]
    # The backend stores padding and truncation of its last call; neither is used here.
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in state.items() if key not in ("padding", "truncation")}
