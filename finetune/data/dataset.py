"""Tokenized dataset: load, split, tokenize, truncate and cache the rows of a recipe's data section.

``data.loss_on``: every assistant reply, the usual choice (Ouyang et al. 2022, arXiv 2203.02155); the last
reply only; or all tokens, instruction modeling, which helps where replies are short and rows few (Shi et al.
2024, arXiv 2405.14394).
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data_templates.segments import REPLY_ROLES, Message, TemplateError, lift_thought
from finetune.data.collate import IGNORE_INDEX, LMExample
from finetune.data.conversation import Conversation
from finetune.data.conversation_rows import ConversationRows, no_usable_rows
from finetune.data.lost_characters import LostCharacters
from finetune.data.mapped_cache import Arrays
from finetune.data.pipeline import EncodedData, EncodedIndex, EncodedRows, encode_splits, prepare, probe_rows
from finetune.data.report import DataReport
from finetune.data.row_store import Rows, RowStore, as_array
from finetune.data.tokens import CHUNK_SIZE, Encoded, Encoder
from finetune.recipe.settings import DataSettings

THOUGHT_LABELS = {
    "strip": "have thoughts, removed (data.reasoning=strip)",
    "mask": "have thoughts, kept without loss (data.reasoning=mask)",
}
INSERTED_THOUGHTS = "have thoughts that this template leaves out, written where the model writes them"
RANGES_PER_SUM = 2**11
"""Rows whose tokens are counted at a time."""

OVERFLOW_VERBS = {"truncate": "truncated", "drop": "dropped"}


class TokenizedRows(Dataset[LMExample]):
    """Tokenized rows in flat arrays: concatenated token ids, their loss mask, and row offsets.

    ``input_ids`` (int32) and ``loss_mask`` (bool) have one entry per token; row i is the tokens from
    ``offsets[i]`` to ``offsets[i + 1]``. ``document_offsets``, if present, has the token offset of each
    document in rows that contain several.
    """

    def __init__(
        self,
        arrays: Arrays,
        locations: Sequence[str],
        source_ids: Sequence[int] | NDArray[np.int32] | None = None,
    ) -> None:
        """Store the arrays, each row's location (``file:line``) and the index of its source (default 0)."""
        self.arrays = arrays
        self.locations = locations
        self.source_ids = np.asarray(
            [0] * len(locations) if source_ids is None else source_ids, dtype=np.int32
        )

    @staticmethod
    def of(rows: EncodedRows) -> "TokenizedRows":
        """Return tokenized rows as a dataset."""
        return TokenizedRows(rows.arrays, rows.locations, rows.source_ids)

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> LMExample:
        start, end = self.arrays["offsets"][index : index + 2]
        # int32 on disk and in memory, int64 only per row: embeddings and cross-entropy index with int64.
        ids_T = torch.from_numpy(self.arrays["input_ids"][start:end].astype(np.int64))
        # A copy: an array that is mapped from the cache is read-only.
        loss_mask_T = torch.from_numpy(self.arrays["loss_mask"][start:end].copy())
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
    prompts: Sequence[Conversation]
    report: DataReport

    @property
    def probe_rows(self) -> list[list[int]]:
        """Return the token ids of a few training rows."""
        return probe_rows(len(self.train), lambda row: self.train[row]["input_ids"].tolist())


@dataclass(frozen=True, slots=True)
class RowPart:
    """A conversation, or its turns up to one of its replies: what becomes one tokenized row."""

    row_id: int
    messages: Sequence[Message]
    is_last: bool


@dataclass(frozen=True)
class Conversations:
    """Conversations and documents, as a kind of tokenized rows: each is a sequence with a loss mask.

    Attributes:
        encoder: template and tokenizer.
        max_length: maximum number of tokens per row.
        loss_on: which tokens carry loss.
        overflow: truncate longer rows, or drop them.
    """

    encoder: Encoder
    max_length: int
    loss_on: str = "assistant"
    overflow: str = "truncate"
    rows: ClassVar[ConversationRows] = ConversationRows()

    @staticmethod
    def of(settings: DataSettings, encoder: Encoder, max_length: int) -> "Conversations":
        """Return the kind with a data section's settings."""
        return Conversations(encoder, max_length, settings.loss_on, settings.overflow)

    def encode(self, rows: Rows[Conversation], index: EncodedIndex, report: DataReport) -> Arrays:
        """Return token ids, loss mask and offsets."""
        ids, loss_mask, offsets = array("i"), bytearray(), array("q", [0])
        lost_characters = LostCharacters(self.encoder.tokenizer)
        for start in range(0, len(rows), CHUNK_SIZE):
            chunk = list(rows[start : start + CHUNK_SIZE])
            lost_characters.add(((row.location, row.messages) for row in chunk), report)
            parts = [part for row_id, row in enumerate(chunk) for part in self._parts(row_id, row, report)]
            encoded_parts = self.encoder.encode_many([part.messages for part in parts])
            for part, encoded in zip(parts, encoded_parts, strict=True):
                row = chunk[part.row_id]
                targets = self._loss_targets(row, part, encoded, report)
                if targets is None or isinstance(encoded, TemplateError):
                    continue
                ids.extend(encoded.input_ids[: self.max_length])
                loss_mask += bytes(targets)
                offsets.append(len(ids))
                index.add(start + part.row_id, row.location, row.source_index)
        report.notes += lost_characters.notes()
        return {
            # Half the size of int64, and enough for the ids of any vocabulary.
            "input_ids": as_array(ids, np.int32),
            "loss_mask": as_array(loss_mask, np.bool_),
            "offsets": as_array(offsets, np.int64),
        }

    def _parts(self, row_id: int, row: Conversation, report: DataReport) -> list["RowPart"]:
        """Return a conversation, or one part per reply if later replies change how earlier ones render."""
        # Loss on all tokens needs one row, whatever its replies' flags.
        scope = "last_assistant" if self.loss_on == "all" else self.loss_on
        conversations = self.encoder.split_replies(apply_loss_scope(row.messages, scope))
        if len(conversations) > 1:
            label = "are split into one row per reply (the template writes earlier replies differently)"
            report.count(label, row.location)
        self._count_thoughts(row, report)
        return [
            RowPart(row_id, messages, number == len(conversations))
            for number, messages in enumerate(conversations, 1)
        ]

    def _count_thoughts(self, row: Conversation, report: DataReport) -> None:
        reasoning = self.encoder.reasoning
        inserted = self.encoder.template.inserts_thoughts and reasoning != "strip"
        if reasoning == "keep" and not inserted:
            return
        if any(lift_thought(message).reasoning for message in row.messages):
            labels = [THOUGHT_LABELS.get(reasoning), INSERTED_THOUGHTS if inserted else None]
            for label in filter(None, labels):
                report.count(label, row.location)

    def _loss_targets(
        self, row: Conversation, part: "RowPart", encoded: Encoded | TemplateError, report: DataReport
    ) -> list[bool] | None:
        """Return a row's loss mask, truncated; None if the row is dropped. The report counts what changes."""
        location = row.location
        if isinstance(encoded, TemplateError):
            report.count("dropped: the template cannot render the conversation", f"{location}: {encoded}")
            return None
        if self.loss_on == "all" and has_untrained_replies(row.messages):
            report.count("have turns marked train=false, trained anyway because data.loss_on=all", location)
        if encoded.num_escaped:
            report.count("contain template markers in their text (escaped)", location)
        if has_replies_without_loss(part.messages, encoded.loss_mask):
            report.count("have replies without loss in this template", location)
        if encoded.num_left_out and part.is_last:
            report.count("have earlier thoughts that this template leaves out of later prompts", location)
        row_mask = build_loss_mask(encoded.loss_mask, self.loss_on)
        if len(encoded.input_ids) > self.max_length:
            verb = OVERFLOW_VERBS[self.overflow]
            report.count(f"longer than {self.max_length} tokens, {verb}", location)
            report.num_too_long += 1
            # Only trained tokens count as lost: a truncated prompt costs nothing.
            report.lost_tokens += sum(row_mask[0 if self.overflow == "drop" else self.max_length :])
            if self.overflow == "drop":
                return None
        # The first token has no prefix to be predicted from, so it is never a target.
        targets = [False, *row_mask[1 : self.max_length]]
        if not any(targets):
            report.count(f"dropped: no trained token within the first {self.max_length} tokens", location)
            return None
        return targets

    def samples(self, rows: Rows[Conversation], limit: int | None) -> Iterator[Conversation]:
        """Return conversations without repeats, to prompt for samples; else the documents."""
        return islice(self._distinct(rows), limit)

    def _distinct(self, rows: Rows[Conversation]) -> Iterator[Conversation]:
        # A document has no prompt of its own; it is only sampled from if there is nothing else.
        for documents in (False, True):
            seen: set[str] = set()
            for row in rows:
                if row.is_document == documents and row.location not in seen:
                    seen.add(row.location)
                    yield row
            if seen:
                return

    def raise_if_empty(self, key: str, encoded: EncodedRows, report: DataReport) -> None:
        """Raise UserError if no row was tokenized."""
        if not len(encoded):
            raise no_usable_rows(key, report)

    def cache_key(self) -> list[Any]:
        """Return all that decides the tokens besides the data section."""
        return [self.encoder.fingerprint(), self.max_length, self.loss_on, self.overflow]

    def code(self) -> tuple[Path, ...]:
        """All code is in this folder."""
        return ()


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
    return to_prepared_data(prepare(Conversations.of(settings, encoder, max_length), settings, seed=seed))


def tokenize_conversations(
    rows: Iterable[Conversation], kind: Conversations, report: DataReport | None = None
) -> PreparedData:
    """Tokenize conversations without a cache, such as those that a policy has generated.

    Args:
        rows: the training rows.
        kind: template, tokenizer and loss.
        report: what was counted so far.

    Raises:
        UserError: no row carries loss.
    """
    store = RowStore(rows).rows()
    reports = (DataReport() if report is None else report, DataReport())
    return to_prepared_data(encode_splits(kind, store, store[:0], hold_out=False, reports=reports))


def to_prepared_data(data: EncodedData) -> PreparedData:
    """Return tokenized conversations as datasets, with the report's totals."""
    tokens, report = TokenizedRows.of(data.train), data.report
    held_out = None if data.held_out is None else TokenizedRows.of(data.held_out)
    report.rows, report.tokens, report.trained_tokens = len(tokens), tokens.num_tokens, tokens.num_trained
    report.longest = max(tokens.lengths)
    record_source_shares(tokens, report)
    samples = data.train.samples if data.held_out is None else data.held_out.samples
    return PreparedData(tokens, held_out, samples, report)


def count_trained(
    loss_mask: NDArray[np.bool_], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the number of tokens with loss in each range of tokens.

    Args:
        loss_mask: of all tokens, (T,).
        starts: first token of each range, ascending, (N,).
        ends: the token after its last one, ascending, (N,); a range may be empty.
    """
    counts = np.empty(len(starts), dtype=np.int64)
    # In pieces: running sums take 8 bytes per token, eight times the mask.
    for first in range(0, len(starts), RANGES_PER_SUM):
        piece = slice(first, first + RANGES_PER_SUM)
        begin, end = int(starts[piece][0]), int(ends[piece][-1])
        sums = np.zeros(end - begin + 1, dtype=np.int64)
        np.cumsum(loss_mask[begin:end], out=sums[1:])
        counts[piece] = sums[ends[piece] - begin] - sums[starts[piece] - begin]
    return counts


def record_source_shares(rows: TokenizedRows, report: DataReport) -> None:
    """Record the rows, tokens and trained tokens of each source in the report."""
    offsets = rows.arrays["offsets"]
    source_ids, lengths = np.asarray(rows.source_ids), np.diff(offsets)
    trained = count_trained(rows.arrays["loss_mask"], offsets[:-1], offsets[1:])
    for index, source in enumerate(report.sources):
        from_source = source_ids == index
        source.rows = int(from_source.sum())
        source.tokens = int(lengths[from_source].sum())
        source.trained_tokens = int(trained[from_source].sum())


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
