"""From a recipe's data section to tokenised rows: read, split, encode, cut, count, cache."""

import hashlib
import json
import os
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch.utils.data import Dataset

from data_templates._segments import REPLIES, Message, TemplateError
from finetune.data.collate import IGNORED, Example
from finetune.data.layouts import recognise, to_conversations
from finetune.data.replies import passed_over
from finetune.data.sources import read_source
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings, MixedSource


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row's messages and where it stands (``file:line``)."""

    messages: list[Message]
    where: str


LONG = {"cut": "cut", "drop": "left out"}
SHOWN_FROM_TRAINING = 64
"""Training rows to take samples from where nothing is held out."""

CACHE_FORMAT = 1
"""Raised when the meaning of a cached file changes, so that old ones are not read."""


class TokenizedRows(Dataset[Example]):
    """Rows as token ids, held in three flat arrays however many rows there are.

    ``input_ids`` (all tokens, int32) and ``trained`` (all tokens, bool) hold the rows end to end; row i takes
    the tokens from ``starts[i]`` to ``starts[i + 1]``.
    """

    def __init__(self, arrays: dict[str, np.ndarray], places: list[str]) -> None:
        """Keep ``input_ids``, ``trained`` and ``starts``, and each row's place (``file:line``)."""
        self.arrays = arrays
        self.places = places

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        """Return one row's ids and labels."""
        start, end = self.arrays["starts"][index : index + 2]
        ids = torch.from_numpy(self.arrays["input_ids"][start:end].astype(np.int64))
        trained = torch.from_numpy(self.arrays["trained"][start:end])
        labels = torch.where(trained, ids, IGNORED)
        return Example(input_ids=ids, labels=labels, row=index)

    @property
    def lengths(self) -> list[int]:
        """Return each row's number of tokens."""
        lengths: list[int] = np.diff(self.arrays["starts"]).tolist()
        return lengths

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all rows."""
        return len(self.arrays["input_ids"])

    @property
    def num_trained(self) -> int:
        """Return how many tokens carry loss."""
        return int(self.arrays["trained"].sum())


@dataclass
class DataReport:
    """What was found in the data and what became of it; nothing is cut or left out without a count here."""

    layout: str = ""
    rows: int = 0
    held_out: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    from_cache: bool = False

    def lines(self) -> list[str]:
        """Return the report as lines for the terminal."""
        share = self.trained_tokens / max(self.tokens, 1)
        lines = [
            f"{self.rows} rows ({self.layout}), {self.held_out} held out; {self.tokens} tokens, "
            f"{share:.0%} carry loss, longest row {self.longest}{self.from_cache * ', from the cache'}"
        ]
        return lines + [f"rows {what}: {n} (first: {self.examples[what]})" for what, n in self.counts.items()]


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs of its data."""

    train: TokenizedRows
    held_out: TokenizedRows | None
    prompts: list[Conversation]
    report: DataReport


def prepare(settings: DataSettings, encoder: Encoder, *, max_length: int, seed: int) -> Prepared:
    """Read, split and tokenise what a data section names.

    Args:
        settings: the recipe's data section.
        encoder: template and tokenizer.
        max_length: tokens of a row at most.
        seed: draws the held-out rows and the rows of capped sources.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or no row is left that carries loss.
    """
    report, aside = DataReport(), DataReport()
    rows = _usable(_read(settings, seed, report), report)
    _refuse_none("data.source", "to learn from", rows, report)
    train, held_out = _split(rows, settings, seed, aside)
    tokens = _tokenise(train, encoder, settings, max_length, report)
    _refuse_none("data.source", "to learn from", tokens, report)
    held_out_tokens = None
    if settings.held_out:
        held_out_tokens = _tokenise(held_out, encoder, settings, max_length, aside)
        _refuse_none("data.held_out", "to measure on", held_out_tokens, aside)
        report.held_out = len(held_out_tokens)
    report.counts |= {f"held out: {what}": number for what, number in aside.counts.items()}
    report.examples |= {f"held out: {what}": where for what, where in aside.examples.items()}
    report.rows, report.tokens, report.trained_tokens = len(tokens), tokens.num_tokens, tokens.num_trained
    report.longest = max(tokens.lengths)
    prompts = _kept(train, tokens)[:SHOWN_FROM_TRAINING]
    if held_out_tokens is not None:
        prompts = _kept(held_out, held_out_tokens)
    return Prepared(tokens, held_out_tokens, prompts, report)


def _refuse_none(where: str, purpose: str, rows: Sized, report: DataReport) -> None:
    if not len(rows):
        found = f"nothing {purpose}: {'; '.join(report.lines()[1:])}"
        repair = "raise data.max_length, or look at the rows named above"
        raise UserError(Problem(where, found, "rows with replies", repair))


def _kept(rows: list[Conversation], tokens: TokenizedRows) -> list[Conversation]:
    """Return the conversations that became tokens; the others cannot be asked either."""
    places = set(tokens.places)
    return [row for row in rows if row.where in places]


def _read(settings: DataSettings, seed: int, report: DataReport) -> list[Conversation]:
    if settings.mix is None:
        assert settings.source is not None
        rows, report.layout = _conversations(
            settings.source, settings.columns, settings.split, settings.revision
        )
        return rows
    parts = [
        _mixed(part, settings.split, np.random.default_rng([seed, index]))
        for index, part in enumerate(settings.mix)
    ]
    report.layout = " + ".join(f"{len(rows)} {layout}" for rows, layout in parts)
    return [row for rows, _ in parts for row in rows]


def _mixed(part: MixedSource, split: str, random: np.random.Generator) -> tuple[list[Conversation], str]:
    rows, layout = _conversations(part.source, part.columns, split, None)
    if part.rows is None or part.rows >= len(rows):
        return rows, layout
    chosen = sorted(random.choice(len(rows), part.rows, replace=False))
    return [rows[index] for index in chosen], layout


def _conversations(
    source: str | list[dict[str, Any]], columns: dict[str, str] | None, split: str, revision: str | None
) -> tuple[list[Conversation], str]:
    rows = read_source(source, split=split, revision=revision)
    where = source if isinstance(source, str) else "data.source"
    layout = recognise(rows[0].columns, columns=columns, where=where)
    talks = to_conversations(rows, layout, columns)
    return [Conversation(talk, row.where) for talk, row in zip(talks, rows, strict=True)], layout.name


def _split(
    rows: list[Conversation], settings: DataSettings, seed: int, aside: DataReport
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the rows to learn and the rows held out; ``aside`` counts what a file of these lost."""
    if isinstance(settings.held_out, str):
        held_out, _ = _conversations(settings.held_out, settings.columns, settings.split, None)
        return rows, _usable(held_out, aside)
    share = settings.held_out
    count = share if isinstance(share, int) else max(1, round(share * len(rows))) if share else 0
    if count and count >= len(rows):
        found = f"{count} of {len(rows)} usable rows"
        raise UserError(Problem("data.held_out", found, "fewer rows than there are"))
    chosen = set(np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count].tolist())
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]


def _usable(rows: Sequence[Conversation], report: DataReport) -> list[Conversation]:
    """Leave out conversations with an empty turn or no reply; cut a last question that has none."""
    usable = []
    for row in rows:
        asks = row.messages[-1].role in ("user", "observation")
        turns = row.messages[:-1] if asks else row.messages
        if any(not turn.content.strip() for turn in turns):
            _count(report, "left out, a turn is empty", row.where)
        elif not any(turn.role in REPLIES for turn in turns):
            _count(report, "left out, without a reply", row.where)
        else:
            usable.append(Conversation(turns, row.where))
    return usable


def _count(report: DataReport, what: str, example: str) -> None:
    report.counts[what] = report.counts.get(what, 0) + 1
    report.examples.setdefault(what, example)


def _tokenise(
    rows: list[Conversation], encoder: Encoder, settings: DataSettings, max_length: int, report: DataReport
) -> TokenizedRows:
    """Encode rows, or take them from the cache of an earlier run that encoded the same rows alike."""
    key = _cache_key(rows, encoder, max_length, settings.too_long)
    path = user_cache_path("llm-align") / "tokens" / f"{key}.safetensors"
    found = DataReport()
    arrays = _load(path, found) if settings.cache else None
    report.from_cache = arrays is not None
    if arrays is None:
        arrays = _encode(rows, encoder, max_length, settings.too_long, found)
        if settings.cache:
            _store(path, arrays, found)
    report.counts |= found.counts
    report.examples |= found.examples
    return TokenizedRows(arrays, [rows[number].where for number in arrays.pop("numbers")])


def _encode(
    rows: list[Conversation], encoder: Encoder, max_length: int, too_long: str, report: DataReport
) -> dict[str, np.ndarray]:
    ids: list[int] = []
    trained: list[bool] = []
    starts, numbers = [0], []
    for number, encoded in enumerate(encoder.encode_many([row.messages for row in rows])):
        where = rows[number].where
        if isinstance(encoded, TemplateError):
            _count(report, "left out, no conversation for this template", f"{where}: {encoded}")
            continue
        if encoded.written_apart:
            _count(report, "hold template markers or special tokens in their text, written apart", where)
        if passed_over(rows[number].messages, encoded.trained):
            _count(report, "hold replies that carry no loss in this template", where)
        if len(encoded.input_ids) > max_length:
            _count(report, f"longer than {max_length} tokens, {LONG[too_long]}", where)
            if too_long == "drop":
                continue
        labels = [False, *encoded.trained[1:max_length]]
        if not any(labels):
            _count(report, f"left out, nothing to learn in the first {max_length} tokens", where)
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


def _cache_key(rows: list[Conversation], encoder: Encoder, max_length: int, too_long: str) -> str:
    head = [CACHE_FORMAT, encoder.fingerprint(), max_length, too_long]
    digest = hashlib.sha256(json.dumps(head).encode())
    for row in rows:
        turns = [[turn.role, turn.content, turn.context, turn.trained] for turn in row.messages]
        digest.update(json.dumps([row.where, turns], ensure_ascii=False).encode())
    return digest.hexdigest()


def _load(path: Path, report: DataReport) -> dict[str, np.ndarray] | None:
    """Return a cached file's arrays and put its counts into the report; a damaged file counts as none."""
    try:
        with safe_open(path, framework="numpy") as file:
            kept = json.loads((file.metadata() or {})["report"])
        arrays: dict[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError):
        return None
    if kept["sha256"] != _checksum(arrays):
        return None
    report.counts, report.examples = kept["counts"], kept["examples"]
    return arrays


def _store(path: Path, arrays: dict[str, np.ndarray], report: DataReport) -> None:
    kept = {"counts": report.counts, "examples": report.examples, "sha256": _checksum(arrays)}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, partial, metadata={"report": json.dumps(kept)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        repair = "data.cache=false, or XDG_CACHE_HOME names another folder"
        found = f"the cache cannot be written: {error}"
        raise UserError(Problem(str(path.parent), found, "a folder that can be written", repair)) from error


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
