"""Tokenized dataset: load, split, tokenize, truncate and cache the rows of a recipe's data section."""

import hashlib
import json
from collections.abc import Callable, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data_templates._segments import TemplateError
from finetune.data.cache import DamagedCacheError, cache_file, made_once, store, stored
from finetune.data.collate import IGNORED, Example
from finetune.data.conversation import Conversation
from finetune.data.gather import gather
from finetune.data.loss_on import any_unlearnt, asked, learnt
from finetune.data.replies import passed_over
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings

LONG = {"cut": "truncated", "drop": "dropped"}
SHOWN_FROM_TRAINING = 64
"""Number of training rows used as sample prompts where nothing is held out."""

CACHE_FORMAT = 2
"""Version of the token cache: incremented when the meaning of a cached file changes."""


class TokenizedRows(Dataset[Example]):
    """Tokenized rows in flat arrays: concatenated token ids, their loss mask, and row offsets.

    ``input_ids`` (int32) and ``loss_mask`` (bool) have one entry per token; row i is the tokens from
    ``offsets[i]`` to ``offsets[i + 1]``. ``document_offsets``, if present, has the token offset of each
    document in rows that contain several.
    """

    def __init__(self, arrays: dict[str, np.ndarray], places: list[str], sources: Sequence[int] = ()) -> None:
        """Store the arrays, each row's location (``file:line``) and the index of its source."""
        self.arrays = arrays
        self.places = places
        self.sources = sources or [0] * len(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        start, end = self.arrays["starts"][index : index + 2]
        # int32 on disk and in memory, int64 only per row: embeddings and cross-entropy index with int64.
        ids = torch.from_numpy(self.arrays["input_ids"][start:end].astype(np.int64))
        trained = torch.from_numpy(self.arrays["trained"][start:end])
        labels = torch.where(trained, ids, IGNORED)
        example = Example(input_ids=ids, labels=labels, row=index)
        if "parts" in self.arrays:
            parts = self.arrays["parts"]
            borders = [*parts[np.searchsorted(parts, start) : np.searchsorted(parts, end)], end]
            example["parts"] = np.diff(borders).tolist()
        return example

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        lengths: list[int] = np.diff(self.arrays["starts"]).tolist()
        return lengths

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all rows."""
        return len(self.arrays["input_ids"])

    @property
    def num_trained(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.arrays["trained"].sum())


@dataclass(frozen=True)
class Prepared:
    """Tokenized training and held-out rows, prompts for samples, and the data report."""

    train: TokenizedRows
    held_out: TokenizedRows | None
    prompts: list[Conversation]
    report: DataReport


def prepare(settings: DataSettings, encoder: Encoder, *, max_length: int, seed: int) -> Prepared:
    """Load, split and tokenize the sources of a data section.

    Args:
        settings: the recipe's data section.
        encoder: template and tokenizer.
        max_length: maximum number of tokens per row.
        seed: seed of the held-out split and of mixture sampling.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or no remaining row carries loss.
    """
    report, aside = DataReport(), DataReport()
    train, held_out = gather(settings, seed, report, aside)
    return prepare_gathered(train, held_out, settings, encoder, max_length=max_length, told=(report, aside))


def prepare_gathered(
    train: list[Conversation],
    held_out: list[Conversation],
    settings: DataSettings,
    encoder: Encoder,
    *,
    max_length: int,
    told: tuple[DataReport, DataReport],
) -> Prepared:
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
    report, aside = told
    tokens = _tokenise(train, encoder, settings, max_length, report)
    _refuse_none("data.source", "to train on", tokens, report)
    held_out_tokens = None
    if settings.held_out:
        held_out_tokens = _tokenise(held_out, encoder, settings, max_length, aside)
        _refuse_none("data.held_out", "to evaluate on", held_out_tokens, aside)
        report.held_out = len(held_out_tokens)
    # One report for both: labels of held-out rows get a prefix.
    report.counts |= {f"held out: {what}": number for what, number in aside.counts.items()}
    report.examples |= {f"held out: {what}": where for what, where in aside.examples.items()}
    report.rows, report.tokens, report.trained_tokens = len(tokens), tokens.num_tokens, tokens.num_trained
    report.longest = max(tokens.lengths)
    tell_shares(tokens, report)
    # Samples come from held-out rows; without any, from the first training rows.
    prompts = _kept(train, tokens)[:SHOWN_FROM_TRAINING]
    if held_out_tokens is not None:
        prompts = _kept(held_out, held_out_tokens)
    return Prepared(tokens, held_out_tokens, prompts, report)


def tell_shares(rows: TokenizedRows, report: DataReport) -> None:
    """Record the rows, tokens and trained tokens of each source in the report."""
    starts = rows.arrays["starts"][:-1]
    trained = np.add.reduceat(rows.arrays["trained"], starts, dtype=np.int64)
    for number, source in enumerate(report.sources):
        own = np.asarray(rows.sources) == number
        source.rows = int(own.sum())
        source.tokens = int(np.asarray(rows.lengths)[own].sum())
        source.trained_tokens = int(trained[own].sum())


def _refuse_none(where: str, purpose: str, rows: Sized, report: DataReport) -> None:
    if not len(rows):
        found = f"no row {purpose}: {'; '.join(report.lines()[1:])}"
        other = "map other columns: data.columns={instruction: Q, output: A}"
        remedy = "raise data.max_length" if report.too_long else other
        repair = f"check the rows named above, or {remedy}"
        raise UserError(Problem(where, found, "rows with an assistant reply", repair))


def _kept(rows: list[Conversation], tokens: TokenizedRows) -> list[Conversation]:
    """Return the tokenized conversations without repeats, to prompt for samples; else the documents."""
    places = set(tokens.places)
    kept = {row.where: row for row in rows if row.where in places}.values()
    # A document has no prompt of its own; it is only sampled from if there is nothing else.
    return [row for row in kept if not row.document] or list(kept)


def _tokenise(
    rows: list[Conversation], encoder: Encoder, settings: DataSettings, max_length: int, report: DataReport
) -> TokenizedRows:
    """Tokenize rows, or read them from the cache if rows, tokenizer and settings are the same."""

    def encode(found: DataReport) -> dict[str, np.ndarray]:
        return _encode(rows, encoder, settings, max_length, found)

    key = _cache_key(rows, encoder, settings, max_length)
    arrays = cached(key, encode, cache=settings.cache, report=report)
    kept = [rows[number] for number in arrays.pop("numbers")]
    return TokenizedRows(arrays, [row.where for row in kept], [row.source for row in kept])


def cached(
    key: str, encode: Callable[[DataReport], dict[str, np.ndarray]], *, cache: bool, report: DataReport
) -> dict[str, np.ndarray]:
    """Return the arrays that ``encode`` returns, cached on disk under ``key`` together with their report.

    Raises:
        UserError: the cache cannot be written.
    """
    found = DataReport()
    if cache:
        path = cache_file("tokens", key)
        # All ranks of a node get here at once: one encodes, the others wait and read the file.
        with made_once(path):
            arrays = _from_cache(path, found)
            report.from_cache = arrays is not None
            if arrays is None:
                arrays = encode(found)
                store(path, arrays, asdict(found))
    else:
        arrays = encode(found)
    # A separate report, so that the cached counts are those of encoding alone.
    report.counts |= found.counts
    report.examples |= found.examples
    report.too_long, report.lost_tokens = found.too_long, found.lost_tokens
    return arrays


def _from_cache(path: Path, report: DataReport) -> dict[str, np.ndarray] | None:
    """Return a cached file's arrays, with its counts in the report; a damaged file is treated as missing."""
    try:
        found = stored(path)
    except DamagedCacheError:
        return None
    if found is None:
        return None
    arrays, notes = found
    report.counts, report.examples = notes["counts"], notes["examples"]
    report.too_long, report.lost_tokens = notes["too_long"], notes["lost_tokens"]
    return arrays


def _encode(
    rows: list[Conversation], encoder: Encoder, settings: DataSettings, max_length: int, report: DataReport
) -> dict[str, np.ndarray]:
    ids: list[int] = []
    trained: list[bool] = []
    # Rows may be dropped here, so the cache has the indices of the others; their locations are in `rows`.
    starts, numbers = [0], []
    asked_for = [asked(row.messages, settings.loss_on) for row in rows]
    for number, encoded in enumerate(encoder.encode_many(asked_for)):
        where = rows[number].where
        if isinstance(encoded, TemplateError):
            report.count("dropped: the template cannot render the conversation", f"{where}: {encoded}")
            continue
        if settings.loss_on == "all" and any_unlearnt(rows[number].messages):
            report.count("have turns marked train=false, trained anyway because data.loss_on=all", where)
        if encoded.written_apart:
            report.count("contain template markers in their text (escaped)", where)
        if passed_over(asked_for[number], encoded.trained):
            report.count("have replies without loss in this template", where)
        marks = learnt(encoded.trained, settings.loss_on)
        if len(encoded.input_ids) > max_length:
            report.count(f"longer than {max_length} tokens, {LONG[settings.too_long]}", where)
            report.too_long += 1
            # Lost are trained tokens only: a truncated prompt costs nothing.
            report.lost_tokens += sum(marks[0 if settings.too_long == "drop" else max_length :])
            if settings.too_long == "drop":
                continue
        # The first token has no prefix to be predicted from, so it is never a target.
        labels = [False, *marks[1:max_length]]
        if not any(labels):
            report.count(f"dropped: no trained token within the first {max_length} tokens", where)
            continue
        ids += encoded.input_ids[:max_length]
        trained += labels
        starts.append(len(ids))
        numbers.append(number)
    return {
        "input_ids": np.asarray(ids, dtype=np.int32),
        "trained": np.asarray(trained, dtype=bool),
        "starts": np.asarray(starts, dtype=np.int64),
        "numbers": np.asarray(numbers, dtype=np.int64),
    }


def _cache_key(rows: list[Conversation], encoder: Encoder, settings: DataSettings, max_length: int) -> str:
    # Everything that decides ids or masks; the location too, as messages about cached rows name it.
    head = [CACHE_FORMAT, encoder.fingerprint(), max_length, settings.too_long, settings.loss_on]
    digest = hashlib.sha256(json.dumps(head).encode())
    for row in rows:
        turns = [[turn.role, turn.content, turn.context, turn.trained] for turn in row.messages]
        digest.update(json.dumps([row.where, turns], ensure_ascii=False).encode())
    return digest.hexdigest()
