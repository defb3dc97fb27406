"""Tokenized dataset: load, split, tokenize, truncate and cache the rows of a recipe's data section.

``data.loss_on``: every assistant reply, the usual choice (Ouyang et al. 2022, arXiv 2203.02155); the last
reply only; or all tokens, instruction modeling, which helps where replies are short and rows few (Shi et al.
2024, arXiv 2405.14394).
"""

import hashlib
import json
from collections.abc import Callable, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data_templates.segments import REPLY_ROLES, Message, TemplateError
from finetune.data.cache import DamagedCacheError, cache_lock, cache_path, read_cached, write_cached
from finetune.data.collate import IGNORE_INDEX, LMExample
from finetune.data.conversation import Conversation
from finetune.data.load import load_conversations
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings

OVERFLOW_VERBS = {"truncate": "truncated", "drop": "dropped"}
MAX_TRAIN_PROMPTS = 64
"""Number of training rows used as sample prompts where nothing is held out."""

CACHE_FORMAT = 5
"""Version of the token cache: incremented when the meaning of a cached file changes."""


class TokenizedRows(Dataset[LMExample]):
    """Tokenized rows in flat arrays: concatenated token ids, their loss mask, and row offsets.

    ``input_ids`` (int32) and ``loss_mask`` (bool) have one entry per token; row i is the tokens from
    ``offsets[i]`` to ``offsets[i + 1]``. ``document_offsets``, if present, has the token offset of each
    document in rows that contain several.
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], locations: list[str], source_ids: Sequence[int] = ()
    ) -> None:
        """Store the arrays, each row's location (``file:line``) and the index of its source."""
        self.arrays = arrays
        self.locations = locations
        self.source_ids = source_ids or [0] * len(locations)

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> LMExample:
        start, end = self.arrays["offsets"][index : index + 2]
        # int32 on disk and in memory, int64 only per row: embeddings and cross-entropy index with int64.
        ids_T = torch.from_numpy(self.arrays["input_ids"][start:end].astype(np.int64))
        loss_mask_T = torch.from_numpy(self.arrays["loss_mask"][start:end])
        labels_T = torch.where(loss_mask_T, ids_T, IGNORE_INDEX)
        example = LMExample(input_ids=ids_T, labels=labels_T, row=index)
        if "document_offsets" in self.arrays:
            document_offsets = self.arrays["document_offsets"]
            # Documents never span rows, so both searches hit a document's start exactly.
            boundaries = [
                *document_offsets[
                    np.searchsorted(document_offsets, start) : np.searchsorted(document_offsets, end)
                ],
                end,
            ]
            example["document_lengths"] = np.diff(boundaries).tolist()
        return example

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        lengths: list[int] = np.diff(self.arrays["offsets"]).tolist()
        return lengths

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all rows."""
        return len(self.arrays["input_ids"])

    @property
    def num_trained(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.arrays["loss_mask"].sum())


@dataclass(frozen=True)
class PreparedData:
    """Tokenized training and held-out rows, prompts for samples, and the data report."""

    train: TokenizedRows
    held_out: TokenizedRows | None
    prompts: list[Conversation]
    report: DataReport


def prepare_conversations(
    settings: DataSettings, encoder: Encoder, *, max_length: int, seed: int
) -> PreparedData:
    """Load, split and tokenize the sources of a data section.

    Args:
        settings: the recipe's data section.
        encoder: template and tokenizer.
        max_length: maximum number of tokens per row.
        seed: seed of the held-out split and of mixture sampling.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or no remaining row carries loss.
    """
    report, held_out_report = DataReport(), DataReport()
    train, held_out = load_conversations(settings, seed, report, held_out_report)
    return tokenize_conversations(
        train, held_out, settings, encoder, max_length=max_length, reports=(report, held_out_report)
    )


def tokenize_conversations(
    train: list[Conversation],
    held_out: list[Conversation],
    settings: DataSettings,
    encoder: Encoder,
    *,
    max_length: int,
    reports: tuple[DataReport, DataReport],
) -> PreparedData:
    """Tokenize loaded conversations.

    Args:
        train: the training rows.
        held_out: the held-out rows.
        settings: the recipe's data section.
        encoder: template and tokenizer.
        max_length: maximum number of tokens per row.
        reports: the reports of the training rows and of the held-out rows.

    Raises:
        UserError: no remaining row carries loss.
    """
    report, held_out_report = reports
    tokens = _tokenize_rows(train, encoder, settings, max_length, report)
    _require_nonempty("data.source", "to train on", tokens, report)
    held_out_tokens = None
    if settings.held_out:
        held_out_tokens = _tokenize_rows(held_out, encoder, settings, max_length, held_out_report)
        _require_nonempty("data.held_out", "to evaluate on", held_out_tokens, held_out_report)
        report.held_out = len(held_out_tokens)
    # One report for both: labels of held-out rows get a prefix.
    report.counts |= {f"held out: {label}": count for label, count in held_out_report.counts.items()}
    report.examples |= {
        f"held out: {label}": location for label, location in held_out_report.examples.items()
    }
    report.rows, report.tokens, report.trained_tokens = len(tokens), tokens.num_tokens, tokens.num_trained
    report.longest = max(tokens.lengths)
    record_source_shares(tokens, report)
    # Samples come from held-out rows; without any, from the first training rows.
    prompts = _sample_prompts(train, tokens)[:MAX_TRAIN_PROMPTS]
    if held_out_tokens is not None:
        prompts = _sample_prompts(held_out, held_out_tokens)
    return PreparedData(tokens, held_out_tokens, prompts, report)


def record_source_shares(rows: TokenizedRows, report: DataReport) -> None:
    """Record the rows, tokens and trained tokens of each source in the report."""
    offsets = rows.arrays["offsets"][:-1]
    # reduceat is wrong for empty segments; there are none, as every row has at least one token.
    trained = np.add.reduceat(rows.arrays["loss_mask"], offsets, dtype=np.int64)
    for index, source in enumerate(report.sources):
        from_source = np.asarray(rows.source_ids) == index
        source.rows = int(from_source.sum())
        source.tokens = int(np.asarray(rows.lengths)[from_source].sum())
        source.trained_tokens = int(trained[from_source].sum())


def _require_nonempty(where: str, purpose: str, rows: Sized, report: DataReport) -> None:
    if not len(rows):
        actual = f"no row {purpose}: {'; '.join(report.lines()[1:])}"
        mapping_repair = "map other columns: 'data.columns={instruction: Q, output: A}'"
        remedy = "raise data.max_length" if report.num_too_long else mapping_repair
        repair = f"check the rows named above, or {remedy}"
        raise UserError(Problem(where, actual, "rows with an assistant reply", repair))


def _sample_prompts(rows: list[Conversation], tokens: TokenizedRows) -> list[Conversation]:
    """Return the tokenized conversations without repeats, to prompt for samples; else the documents."""
    locations = set(tokens.locations)
    by_location = {row.location: row for row in rows if row.location in locations}.values()
    # A document has no prompt of its own; it is only sampled from if there is nothing else.
    return [row for row in by_location if not row.is_document] or list(by_location)


def _tokenize_rows(
    rows: list[Conversation], encoder: Encoder, settings: DataSettings, max_length: int, report: DataReport
) -> TokenizedRows:
    """Tokenize rows, or read them from the cache if rows, tokenizer and settings are the same."""

    def encode(report: DataReport) -> dict[str, np.ndarray]:
        return _encode_conversations(rows, encoder, settings, max_length, report)

    key = _tokens_cache_key(rows, encoder, settings, max_length)
    arrays = load_or_encode(key, encode, cache=settings.cache, report=report)
    tokenized = [rows[row_id] for row_id in arrays.pop("row_ids")]
    return TokenizedRows(arrays, [row.location for row in tokenized], [row.source_index for row in tokenized])


def load_or_encode(
    key: str, encode: Callable[[DataReport], dict[str, np.ndarray]], *, cache: bool, report: DataReport
) -> dict[str, np.ndarray]:
    """Return the arrays that ``encode`` returns, cached on disk under ``key`` together with their report.

    Raises:
        UserError: the cache cannot be written.
    """
    encode_report = DataReport()
    if cache:
        path = cache_path("tokens", key)
        # All ranks of a node get here at once: one encodes, the others wait and read the file.
        with cache_lock(path):
            arrays = _load_cached(path, encode_report)
            report.from_cache = arrays is not None
            if arrays is None:
                arrays = encode(encode_report)
                write_cached(path, arrays, asdict(encode_report))
    else:
        arrays = encode(encode_report)
    # A separate report, so that the cached counts are those of encoding alone.
    report.counts |= encode_report.counts
    report.examples |= encode_report.examples
    report.num_too_long, report.lost_tokens = encode_report.num_too_long, encode_report.lost_tokens
    return arrays


def _load_cached(path: Path, report: DataReport) -> dict[str, np.ndarray] | None:
    """Return a cached file's arrays, with its counts in the report; a damaged file is treated as missing."""
    try:
        cached_file = read_cached(path)
    except DamagedCacheError:
        return None
    if cached_file is None:
        return None
    arrays, notes = cached_file
    report.counts, report.examples = notes["counts"], notes["examples"]
    report.num_too_long, report.lost_tokens = notes["num_too_long"], notes["lost_tokens"]
    return arrays


def _encode_conversations(
    rows: list[Conversation], encoder: Encoder, settings: DataSettings, max_length: int, report: DataReport
) -> dict[str, np.ndarray]:
    ids: list[int] = []
    loss_mask: list[bool] = []
    # Rows may be dropped here, so the cache has the indices of the others; their locations are in `rows`.
    offsets, row_ids = [0], []
    # Loss on all tokens needs one row, whatever its replies' flags.
    scope = "last_assistant" if settings.loss_on == "all" else settings.loss_on
    split = [encoder.split_replies(apply_loss_scope(row.messages, scope)) for row in rows]
    parts = [(row_id, part) for row_id, conversations in enumerate(split) for part in conversations]
    for row_id, conversations in enumerate(split):
        if len(conversations) > 1:
            report.count(
                "are split into one row per reply (the template writes earlier replies differently)",
                rows[row_id].location,
            )
    for (row_id, messages), encoded in zip(
        parts, encoder.encode_many([part for _, part in parts]), strict=True
    ):
        location = rows[row_id].location
        if isinstance(encoded, TemplateError):
            report.count("dropped: the template cannot render the conversation", f"{location}: {encoded}")
            continue
        if settings.loss_on == "all" and has_untrained_replies(rows[row_id].messages):
            report.count("have turns marked train=false, trained anyway because data.loss_on=all", location)
        if encoded.num_escaped:
            report.count("contain template markers in their text (escaped)", location)
        if has_replies_without_loss(messages, encoded.loss_mask):
            report.count("have replies without loss in this template", location)
        if encoded.num_left_out and messages is split[row_id][-1]:
            report.count("have earlier thoughts that this template leaves out of later prompts", location)
        row_mask = build_loss_mask(encoded.loss_mask, settings.loss_on)
        if len(encoded.input_ids) > max_length:
            report.count(f"longer than {max_length} tokens, {OVERFLOW_VERBS[settings.overflow]}", location)
            report.num_too_long += 1
            # Only trained tokens count as lost: a truncated prompt costs nothing.
            report.lost_tokens += sum(row_mask[0 if settings.overflow == "drop" else max_length :])
            if settings.overflow == "drop":
                continue
        # The first token has no prefix to be predicted from, so it is never a target.
        targets = [False, *row_mask[1:max_length]]
        if not any(targets):
            report.count(f"dropped: no trained token within the first {max_length} tokens", location)
            continue
        ids += encoded.input_ids[:max_length]
        loss_mask += targets
        offsets.append(len(ids))
        row_ids.append(row_id)
    return {
        # Half the size of int64, and enough for the ids of any vocabulary.
        "input_ids": np.asarray(ids, dtype=np.int32),
        "loss_mask": np.asarray(loss_mask, dtype=bool),
        "offsets": np.asarray(offsets, dtype=np.int64),
        "row_ids": np.asarray(row_ids, dtype=np.int64),
    }


def _tokens_cache_key(
    rows: list[Conversation], encoder: Encoder, settings: DataSettings, max_length: int
) -> str:
    # Everything that decides ids or masks; the location too, as messages about cached rows name it.
    head = [CACHE_FORMAT, encoder.fingerprint(), max_length, settings.overflow, settings.loss_on]
    digest = hashlib.sha256(json.dumps(head).encode())
    for row in rows:
        turns = [[turn.key, turn.trained] for turn in row.messages]
        digest.update(json.dumps([row.location, turns], ensure_ascii=False).encode())
    return digest.hexdigest()


def apply_loss_scope(messages: Sequence[Message], loss_on: str) -> list[Message]:
    """Return a conversation in which the replies' ``trained`` flags follow ``data.loss_on``.

    ``last_assistant`` removes the loss from every reply but the last; a last reply that the data itself marks
    as untrained stays untrained.
    """
    last = max((i for i, turn in enumerate(messages) if turn.role in REPLY_ROLES), default=-1)
    if loss_on != "last_assistant":
        return list(messages)
    return [turn if index == last else replace(turn, trained=False) for index, turn in enumerate(messages)]


def has_untrained_replies(messages: Sequence[Message]) -> bool:
    """Return True if the data itself marks a reply as untrained."""
    return any(turn.role in REPLY_ROLES and not turn.trained for turn in messages)


def build_loss_mask(reply_mask: Sequence[bool], loss_on: str) -> list[bool]:
    """Return a row's loss mask from the mask of its trained replies.

    ``all`` includes every token: prompts, markup and end tokens, and replies that are marked as untrained.
    """
    return [True] * len(reply_mask) if loss_on == "all" else list(reply_mask)


def has_replies_without_loss(messages: Sequence[Message], loss_mask: Sequence[bool]) -> bool:
    """Return True if a template leaves replies without loss that the data marks for training.

    Args:
        messages: a conversation.
        loss_mask: its loss mask, of length T.
    """
    # Each reply is one run of trained tokens, as the prompt between two replies carries no loss.
    num_to_train = sum(turn.trained for turn in messages if turn.role in REPLY_ROLES)
    # With a single reply the whole mask would be empty, and the row is dropped and counted elsewhere.
    return num_to_train > 1 and num_to_train > sum(is_trained for is_trained, _ in groupby(loss_mask))
