"""Checks of tokenized rows: trained EOS, loss mask, single BOS, vocabulary; and the truncation report.

``check_tokenized`` runs them for the stages that train on rows of tokens.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.collate import IGNORE_INDEX, LMExample
from finetune.data.conversation import Conversation
from finetune.data.dataset import TokenizedRows, count_trained
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.distributed import sharding
from finetune.recipe.errors import Problem
from finetune.training.model import Policy, TextEncoding
from finetune.training.preflight.checks import CheckResult, failed, first_few
from finetune.training.preflight.reply_checks import check_replies

TOKENS_PER_COUNT = 2**22
"""Tokens that are counted at a time."""

MIN_EOS_SHARE = 0.99
"""Share of the untruncated rows that must end with a trained stop token; one in a hundred may not."""
MAX_LABELS_AFTER_EOS = 2
"""Labels that may follow a stop token: ChatML's line feed if every token is trained."""
MIN_TRAINED_SHARE = 0.05
"""Share of trained tokens below which we warn: most of the compute then carries no loss."""
MAX_LOST_SHARE = 0.05
"""Share of the trained tokens, or of the rows, that ``data.max_length`` may truncate without a warning."""

LENGTH_REPAIR = "raise data.max_length if the model has the positions, or set data.overflow=drop"

TokenName = Callable[[int], str]
"""Returns the text of a token id."""


def check_eos_trained(
    rows: TokenizedRows, stop_ids: Collection[int], *, max_length: int, name_of: TokenName
) -> CheckResult:
    """Check that the last label of each untruncated row is a stop token (EOS).

    Args:
        rows: the training dataset.
        stop_ids: the tokens that end a reply.
        max_length: rows of this length may be truncated: they count only if they end with a stop token.
        name_of: returns the text of a token id.
    """
    offsets = rows.arrays["offsets"]
    ends_with_eos = _ends_with_eos(rows, stop_ids)
    untruncated = ends_with_eos | (np.diff(offsets) < max_length)
    names = " or ".join(sorted({name_of(token) for token in stop_ids}))
    if not untruncated.any():
        detail = f"every row is truncated: none teaches the model to write {names}; {LENGTH_REPAIR}"
        return CheckResult("stop token", detail, warned=True)
    share = float(ends_with_eos[untruncated].mean())
    if share >= MIN_EOS_SHARE:
        return CheckResult(
            "stop token", f"{_percent(share)} of the untruncated rows end with a trained {names}"
        )
    first = int(np.flatnonzero(untruncated & ~ends_with_eos)[0])
    actual = (
        f"{_percent(1 - share)} of the rows do not end with a trained {names} "
        f"(first: {rows.locations[first]}: {_describe_end(rows[first], stop_ids, name_of)}); "
        "the model would never stop"
    )
    expected = f"at least {MIN_EOS_SHARE:.0%} of the rows with {names} as their last label"
    repair = (
        "in the template's file render the assistant's turn with reply_segments(message): it ends with a "
        "trained EOS; or data.template=chatml"
    )
    return failed("stop token", Problem("data.template", actual, expected, repair))


def _ends_with_eos(rows: TokenizedRows, stop_ids: Collection[int]) -> np.ndarray:
    """Return for each row whether a trained stop token is among its last labels."""
    ids, loss_mask, offsets = (rows.arrays[key] for key in ("input_ids", "loss_mask", "offsets"))
    is_stop = np.zeros(len(ids), dtype=bool)
    # One by one: np.isin takes several times the memory of the ids.
    for token in stop_ids:
        is_stop |= ids == token
    eos_positions = np.flatnonzero(loss_mask & is_stop)
    # Before its row's first token, if a row has no trained stop token.
    last_eos = offsets[:-1] - 1
    # Positions ascend, so that a row's last stop token overwrites the earlier ones.
    last_eos[np.searchsorted(offsets, eos_positions, side="right") - 1] = eos_positions
    labels_after_eos = count_trained(loss_mask, last_eos + 1, offsets[1:])
    ends_with_eos: np.ndarray = (last_eos >= offsets[:-1]) & (labels_after_eos <= MAX_LABELS_AFTER_EOS)
    return ends_with_eos


def _describe_end(row: LMExample, stop_ids: Collection[int], name_of: TokenName) -> str:
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    last = max((position for position, label in enumerate(labels) if label != IGNORE_INDEX), default=0)
    if any(token in stop_ids for token in ids[last + 1 :]):
        return "it is in the row, but carries no loss"
    return f"the last trained token is {name_of(ids[last])!r}"


def check_loss_mask(rows: TokenizedRows) -> CheckResult:
    """Check that every row has a label after its first token; report the share of trained tokens."""
    loss_mask, offsets = rows.arrays["loss_mask"], rows.arrays["offsets"]
    # A row's first token follows nothing, so it is no target.
    counts = count_trained(loss_mask, offsets[:-1] + 1, offsets[1:])
    share = float(counts.sum()) / rows.num_tokens
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        actual = f"{len(empty)} of {len(rows)} rows have no trained token (first: {rows.locations[empty[0]]})"
        repair = "mark the reply as trained in the template, or remove those rows"
        return failed("loss mask", Problem("data.template", actual, "a reply that carries loss", repair))
    detail = f"{_percent(share)} of the tokens are trained, at least {counts.min()} per row"
    few = share < MIN_TRAINED_SHARE
    return CheckResult(
        "loss mask", detail + few * ": very few; does data.columns name the reply?", warned=few
    )


def check_single_bos(
    rows: TokenizedRows, bos_id: int | None, *, required: bool, name_of: TokenName
) -> CheckResult:
    """Check that no row begins with two BOS tokens, or lacks the one that its tokenizer adds.

    Args:
        rows: the training dataset.
        bos_id: the tokenizer's BOS token, if it has one.
        required: whether every row must begin with it.
        name_of: returns the text of a token id.
    """
    if bos_id is None:
        return CheckResult("BOS", "the tokenizer has none")
    ids, offsets = rows.arrays["input_ids"], rows.arrays["offsets"]
    first = ids[offsets[:-1]] == bos_id
    # The last row may be one token long: its second position is clipped, and its length excludes it.
    second = (np.diff(offsets) > 1) & (ids[np.minimum(offsets[:-1] + 1, len(ids) - 1)] == bos_id)
    name = name_of(bos_id)
    doubled, missing = np.flatnonzero(first & second), np.flatnonzero(~first)
    repair = "begin the template with one BOS segment (not its text), or data.template=chatml"
    if len(doubled):
        actual = f"{len(doubled)} rows begin with {name} twice (first: {rows.locations[doubled[0]]})"
        return failed("BOS", Problem("data.template", actual, f"one {name} at the beginning", repair))
    if required and len(missing):
        actual = f"{len(missing)} rows begin without {name} (first: {rows.locations[missing[0]]})"
        expected = f"one {name} at the beginning: the tokenizer adds it to every text"
        return failed("BOS", Problem("data.template", actual, expected, repair))
    return CheckResult(
        "BOS", f"{len(rows) - len(missing)} of {len(rows)} rows begin with one {name}, none with two"
    )


def report_truncation(
    *, num_rows: int, num_too_long: int, trained_tokens: int, lost_tokens: int, max_length: int
) -> CheckResult:
    """Report the rows longer than ``max_length``, and the trained tokens lost to truncation.

    Args:
        num_rows: number of training rows.
        num_too_long: number of rows longer than ``max_length``, truncated or dropped.
        trained_tokens: number of trained tokens in the rows.
        lost_tokens: number of trained tokens lost.
        max_length: maximum tokens of a row.
    """
    if not num_too_long:
        return CheckResult("truncation", f"no row is longer than {max_length} tokens")
    share = lost_tokens / max(trained_tokens + lost_tokens, 1)
    detail = (
        f"{num_too_long} rows were longer than {max_length} tokens; {_percent(share)} of the trained tokens "
        f"({lost_tokens}) are lost"
    )
    needs_attention = share > MAX_LOST_SHARE or num_too_long > MAX_LOST_SHARE * (num_rows + num_too_long)
    return CheckResult(
        "truncation", f"{detail}; {LENGTH_REPAIR}" if needs_attention else detail, warned=needs_attention
    )


def _percent(share: float) -> str:
    """Format a share; never as 100% or 0% after rounding."""
    text = f"{share:.0%}"
    return f"{share:.2%}" if text in ("100%", "0%") and share not in (0.0, 1.0) else text


def check_vocab_size(
    used_ids: Collection[int], embedding: Tensor, *, trained: bool, added: Mapping[str, int], num_tokens: int
) -> CheckResult:
    """Check that each token of the data has an embedding that is not both zero and frozen.

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
            f"{rows} embeddings for {num_tokens} tokens of the tokenizer; the data uses {first_few(names)}"
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
    used = {int(token) for token in stop_ids}
    # np.unique would sort all tokens, and bincount takes 8 bytes per token: hence in pieces.
    for start in range(0, len(ids), TOKENS_PER_COUNT):
        used.update(np.flatnonzero(np.bincount(ids[start : start + TOKENS_PER_COUNT])).tolist())
    return used


def check_tokenized(
    policy: Policy,
    rows: TokenizedRows,
    report: DataReport,
    text: TextEncoding,
    *,
    blocks: bool = False,
    conversations: Iterable[Conversation] | None = None,
) -> list[CheckResult]:
    """Check tokenized training rows and their embeddings.

    Args:
        policy: the model.
        rows: the training rows.
        report: their data report.
        text: template and tokenizer.
        blocks: whether rows are cut out of documents.
        conversations: some conversations of this data, whose replies are checked; None: no replies.
    """
    replies = [] if conversations is None else [check_replies(conversations, text.encoder)]
    return [
        *check_rows(rows, report, text.encoder, max_length=text.max_length, blocks=blocks),
        *replies,
        check_vocabulary(policy.model, rows, text.encoder),
    ]


def check_rows(
    data: TokenizedRows, report: DataReport, encoder: Encoder, *, max_length: int, blocks: bool
) -> list[CheckResult]:
    """Check the tokenized training rows; ``blocks`` of documents may begin and end within a text."""
    tokenizer = encoder.tokenizer
    name_of = tokenizer.convert_ids_to_tokens
    # A model's own chat template decides whether a row begins with BOS; blocks are cut out of a text.
    bos_required = encoder.name != "tokenizer" and not blocks and _adds_bos(tokenizer)
    eos_check = check_eos_trained(data, encoder.stop_ids, max_length=max_length, name_of=name_of)
    return [
        *([] if blocks else [eos_check]),
        check_loss_mask(data),
        check_single_bos(data, tokenizer.bos_token_id, required=bos_required, name_of=name_of),
        report_truncation(
            num_rows=report.rows,
            num_too_long=report.num_too_long,
            trained_tokens=report.trained_tokens,
            lost_tokens=report.lost_tokens,
            max_length=max_length,
        ),
    ]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    # A tokenizer may define BOS and not add it (GPT-2): only encoding a text shows it.
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def check_vocabulary(model: PreTrainedModel, data: TokenizedRows, encoder: Encoder) -> CheckResult:
    """Check the embeddings; a token without one would crash the model checks."""
    embedding = model.get_input_embeddings()
    with sharding.gathered_params(embedding.weight) as (weight,):
        return check_vocab_size(
            used_tokens(data.arrays["input_ids"], encoder.stop_ids),
            weight,
            trained=any(param.requires_grad for param in embedding.parameters()),
            added=encoder.tokenizer.get_added_vocab(),
            num_tokens=len(encoder.tokenizer),
        )
