"""From a data section to token ids: load, split, tokenize, and cache the result.

One pipeline for conversations, documents, preferences and prompts. The cache is keyed by everything that
decides the result: the contents of the files, the data section, the tokenizer and this code. A second start
reads no row.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

import data_templates
from data_templates.segments import Message
from finetune.data.cache import cache_lock, cache_path
from finetune.data.conversation import Conversation
from finetune.data.files import Source, data_fingerprint, source_files
from finetune.data.load import RowKind, load_rows
from finetune.data.mapped_cache import Arrays, read_mapped, write_mapped
from finetune.data.report import DataReport, SourceReport
from finetune.data.row_store import Rows, RowT, TextBuilder, TextColumn, message_values
from finetune.data.sources import hub_fingerprint
from finetune.recipe.discovery import local_path
from finetune.recipe.limits import AtMost
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.settings import DataSettings

MAX_TRAIN_SAMPLES = 64
"""Training rows that are kept as sample prompts where nothing is held out."""

PROBE_ROWS, PROBE_TOKENS = 4, 32
"""Rows, and tokens of each, on which the saved model is compared with the trained one."""

CODE = (Path(__file__).parent, Path(data_templates.__path__[0]))
"""Folders whose code decides every kind's rows and tokens."""


def probe_rows(num_rows: int, ids_of: Callable[[int], Iterable[int]]) -> list[list[int]]:
    """Return the last token ids of the first rows; their beginnings often are one template text.

    Args:
        num_rows: number of rows.
        ids_of: returns the token ids of a row.
    """
    return [[int(token) for token in ids_of(row)][-PROBE_TOKENS:] for row in range(min(num_rows, PROBE_ROWS))]


class ConversationColumn(Sequence[Conversation]):
    """Conversations as JSON lines, decoded when they are read."""

    def __init__(self, lines: TextColumn) -> None:
        """Take the conversations that ``of`` has encoded."""
        self.lines = lines

    @staticmethod
    def of(rows: Iterable[Conversation]) -> "ConversationColumn":
        """Encode conversations."""
        records = (
            [[message_values(turn) for turn in row.messages], row.location, row.source_index, row.score]
            for row in rows
        )
        return ConversationColumn(TextColumn.of(json.dumps(record, ensure_ascii=False) for record in records))

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...

    def __getitem__(self, index: "int | slice") -> "Conversation | list[Conversation]":
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        messages, *rest = json.loads(self.lines[index])
        return Conversation([Message(*values) for values in messages], *rest)


@dataclass(frozen=True)
class EncodedRows:
    """Tokenized rows: flat arrays, each row's location and source, and rows to sample from as texts."""

    arrays: Arrays
    locations: TextColumn
    source_ids: NDArray[np.int32]
    samples: ConversationColumn

    def __len__(self) -> int:
        return len(self.locations)


@dataclass(frozen=True)
class EncodedData:
    """The tokenized training and held-out rows, and the report of both."""

    train: EncodedRows
    held_out: EncodedRows | None
    report: DataReport


class EncodedIndex:
    """Collects which rows were tokenized, where they are from, and the indices of all of them."""

    def __init__(self) -> None:
        self.row_ids = array("q")
        self.locations = TextBuilder()
        self.source_ids = array("i")

    def add(self, row_id: int, location: str, source: int) -> None:
        """Add a row."""
        self.row_ids.append(row_id)
        self.locations.append(location)
        self.source_ids.append(source)


class TokenizedKind(Protocol[RowT]):
    """What differs between conversations, preferences and prompts, up to their tokens."""

    @property
    def rows(self) -> RowKind[RowT]:
        """How rows become usable, and which are held out."""

    def encode(self, rows: Rows[RowT], index: EncodedIndex, report: DataReport) -> Arrays:
        """Tokenize rows; ``index`` receives the rows that are used, ``report`` counts the others."""

    def samples(self, rows: Rows[RowT], limit: int | None) -> Iterable[Conversation]:
        """Return tokenized rows to keep as texts: prompts for samples, graders and RL."""

    def raise_if_empty(self, key: str, encoded: EncodedRows, report: DataReport) -> None:
        """Raise UserError if no row was tokenized."""

    def cache_key(self) -> list[Any]:
        """Return all that decides the tokens besides the data section and this package, as JSON."""

    def code(self) -> Iterable[Path]:
        """Return the folders whose code decides the rows, besides this one."""


def prepare(
    kind: TokenizedKind[RowT],
    settings: DataSettings,
    *,
    seed: int,
    report: Callable[[], DataReport] = DataReport,
) -> EncodedData:
    """Load, split and tokenize the sources of a data section, or read the result from the cache.

    Args:
        kind: conversations, preferences or prompts.
        settings: the recipe's data section.
        seed: seed of the held-out split and of mixture sampling.
        report: makes an empty report.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, no row remains, or the cache cannot be
            written.
    """

    def build() -> EncodedData:
        train_report, held_out_report = report(), report()
        splits = load_rows(kind.rows, settings, seed, train_report, held_out_report)
        return encode_splits(
            kind, *splits, hold_out=bool(settings.held_out), reports=(train_report, held_out_report)
        )

    if not settings.cache:
        return build()
    path = cache_path("tokens", _cache_key(kind, settings, seed)).with_suffix("")
    # All ranks of a node get here at once: one tokenizes, the others wait and read its files.
    with cache_lock(path):
        cached = read_mapped(path)
        if cached is not None:
            return _from_cache(*cached)
        # Read back: mapped from the files, the arrays are shared by the ranks of a node.
        write_mapped(path, *_to_cache(build()))
        written = read_mapped(path)
        assert written is not None, "written under the lock"
        return _from_cache(*written, from_cache=False)


def encode_splits(
    kind: TokenizedKind[RowT],
    train: Rows[RowT],
    held_out: Rows[RowT],
    *,
    hold_out: bool,
    reports: tuple[DataReport, DataReport],
) -> EncodedData:
    """Tokenize the training and the held-out rows.

    Args:
        kind: conversations, preferences or prompts.
        train: the training rows.
        held_out: the held-out rows.
        hold_out: whether rows are held out.
        reports: the reports of the training rows and of the held-out rows; both are one afterwards.

    Raises:
        UserError: no row remains.
    """
    report, held_out_report = reports
    # Samples come from held-out rows; without any, from the first training rows.
    encoded = _encode(kind, train, report, sample_limit=MAX_TRAIN_SAMPLES)
    kind.raise_if_empty("data.source", encoded, report)
    encoded_held_out = None
    if hold_out:
        encoded_held_out = _encode(kind, held_out, held_out_report, sample_limit=None)
        kind.raise_if_empty("data.held_out", encoded_held_out, held_out_report)
        report.held_out = len(encoded_held_out)
    # One report for both: labels of held-out rows get a prefix.
    report.merge(held_out_report, prefix="held out: ")
    return EncodedData(encoded, encoded_held_out, report)


def _encode(
    kind: TokenizedKind[RowT], rows: Rows[RowT], report: DataReport, *, sample_limit: int | None
) -> EncodedRows:
    index = EncodedIndex()
    arrays = kind.encode(rows, index, report)
    samples = kind.samples(rows.take(index.row_ids), sample_limit)
    return EncodedRows(
        arrays,
        index.locations.column(),
        np.asarray(index.source_ids, dtype=np.int32),
        ConversationColumn.of(samples),
    )


def _cache_key(kind: TokenizedKind[Any], settings: DataSettings, seed: int) -> str:
    sources = [(settings.source, settings.revision, settings.split)]
    sources += [(entry.source, entry.revision, entry.split or settings.split) for entry in settings.mix or []]
    if isinstance(settings.held_out, Source):
        sources.append((settings.held_out, None, settings.split))
    # The rows are in the sources' digests. How they are laid out after tokenization is not in the key, and
    # the length is in the kind's: documents have no limit here.
    section = settings.model_copy(update={"source": None, "mix": None}).model_dump(
        mode="json", exclude={"cache", "packing", "max_length"}
    )
    mix = [entry.model_dump(mode="json", exclude={"source"}) for entry in settings.mix or []]
    content = [
        type(kind).__name__,
        kind.cache_key(),
        section,
        # A limit may hold out fewer rows than the same number that the user typed.
        isinstance(settings.held_out, AtMost),
        mix,
        seed if _depends_on_seed(settings) else None,
        data_fingerprint(settings),
        [_source_state(*source, settings) for source in sources],
        [_code_digest(folder) for folder in (*CODE, *kind.code())],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _depends_on_seed(settings: DataSettings) -> bool:
    holds_out_at_random = bool(settings.held_out) and not isinstance(settings.held_out, Source)
    return settings.mix is not None or settings.select is not None or holds_out_at_random


def _source_state(source: Source | None, revision: str | None, split: str, settings: DataSettings) -> Any:
    """Return the names of a source's files, which its locations have, or the digest of rows without files."""
    if source is None:
        return None
    if isinstance(source, PythonRows):
        return source.sha256
    path = local_path(source)
    if path is None:
        return [source, hub_fingerprint(source, split, revision)]
    return [str(file) for file in source_files(path, settings.text_format, split)]


def _code_digest(folder: Path) -> str:
    """Return a digest of a folder's Python files: rows that other code has prepared are not read."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _to_cache(data: EncodedData) -> tuple[Arrays, dict[str, Any]]:
    """Return the data as arrays by name, and the report as JSON."""
    splits = {"train": data.train} | ({"held_out": data.held_out} if data.held_out else {})
    arrays: Arrays = {}
    for split, rows in splits.items():
        columns = {"locations": rows.locations, "samples": rows.samples.lines}
        arrays |= {f"{split}.arrays.{name}": array for name, array in rows.arrays.items()}
        arrays[f"{split}.source_ids"] = rows.source_ids
        for name, column in columns.items():
            arrays |= {f"{split}.{name}.data": column.data, f"{split}.{name}.offsets": column.offsets}
    return arrays, asdict(data.report)


def _from_cache(arrays: Arrays, notes: Mapping[str, Any], *, from_cache: bool = True) -> EncodedData:
    sources = [SourceReport(**source) for source in notes["sources"]]
    report = DataReport(**{**notes, "sources": sources, "from_cache": from_cache})
    held_out = _rows_from_cache(arrays, "held_out") if "held_out.source_ids" in arrays else None
    return EncodedData(_rows_from_cache(arrays, "train"), held_out, report)


def _rows_from_cache(arrays: Arrays, split: str) -> EncodedRows:
    prefix = f"{split}.arrays."
    locations, samples = (
        TextColumn(arrays[f"{split}.{name}.data"], arrays[f"{split}.{name}.offsets"])
        for name in ("locations", "samples")
    )
    return EncodedRows(
        {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)},
        locations,
        arrays[f"{split}.source_ids"],
        ConversationColumn(samples),
    )
