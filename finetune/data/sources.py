"""Read rows with their locations from a Hub dataset, JSON, CSV, Parquet or text files, a folder or a list.

No heavy imports: the fingerprint of a run reads files and parses nothing.
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.recipe.discovery import DATA_SUFFIXES, TEXT_SUFFIXES, local_path, looks_local
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings, TextFormat

if TYPE_CHECKING:
    import datasets

# A long document is one field; the default limit of 128 KiB is far below the fields of published datasets.
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a source: its columns and its location (``file:line``)."""

    columns: dict[str, Any]
    location: str


RowSelector = Callable[[int], Sequence[int]]
"""Returns the indices of the rows to use, given the number of rows."""


def read_source(
    source: str | list[dict[str, Any]],
    *,
    split: str = "train",
    revision: str | None = None,
    row_selector: RowSelector = range,
    text_format: TextFormat | None = None,
) -> list[SourceRow]:
    """Read the rows of a source.

    Args:
        source: Hub id (``owner/name``, or ``owner/name:subset``), file (``.json .jsonl .csv .tsv .parquet``,
            ``.gz`` too), folder of such files, or rows.
        split: split of a Hub dataset.
        revision: revision of a Hub dataset.
        row_selector: selects the rows to return, by default all; of a Hub dataset only these are read.
        text_format: how ``.txt`` and ``.md`` files become rows with a ``text`` column; None refuses them.

    Raises:
        UserError: the source cannot be read, or has no rows; the message names the file and line.
    """
    if isinstance(source, list):
        rows = [
            SourceRow(_check_object(entry, f"row {i + 1}"), f"row {i + 1}") for i, entry in enumerate(source)
        ]
    elif path := local_path(source):
        rows = [row for file in data_files(path, text_format) for row in _read_file(file, text_format)]
    elif looks_local(source):
        repair = "check the path; a Hub dataset is named owner/name"
        raise UserError(Problem(source, "no such file or folder", "an existing path", repair))
    else:
        table = _load_hub_dataset(source, split, revision)
        row_ids = row_selector(len(table))
        indexed_columns = zip(row_ids, table.select(row_ids), strict=True)
        return _require_rows(
            [SourceRow(dict(columns), f"{source}[{split}] row {i + 1}") for i, columns in indexed_columns],
            source,
        )
    row_ids = row_selector(len(rows))
    return _require_rows(rows if len(row_ids) == len(rows) else [rows[i] for i in row_ids], source)


def _require_rows(rows: list[SourceRow], source: str | list[dict[str, Any]]) -> list[SourceRow]:
    if not rows:
        where = source if isinstance(source, str) else "data.source"
        raise UserError(Problem(where, "no rows", "at least one row"))
    return rows


def _read_file(path: Path, text_format: TextFormat | None) -> list[SourceRow]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _read_parquet(path)
    try:
        with _open_text(path) as stream:
            if text_format is not None and is_text_file(path):
                return list(_split_documents(path, stream.read(), text_format.separator))
            return _read_text_file(path, stream, name.removesuffix(".gz"))
    except UnicodeDecodeError as error:
        repair = f"if it is Korean Windows text: iconv -f cp949 -t utf-8 {path.name}"
        raise UserError(Problem(str(path), f"not UTF-8: {error}", "UTF-8 text", repair)) from error
    except (OSError, EOFError, zlib.error) as error:
        expected = "a complete gzip file" if name.endswith(".gz") else "a readable file"
        raise UserError(Problem(str(path), f"cannot be read: {error}", expected)) from error


def _open_text(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        # Decompress everything first: gzip's checksum is at the end, and damage must not be read as text.
        content = io.BytesIO(gzip.decompress(path.read_bytes()))
        return io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    # utf-8-sig: files written on Windows may begin with a byte order mark. newline="" as csv demands.
    return path.open(encoding="utf-8-sig", newline="")


def _split_documents(path: Path, text: str, separator: str | None) -> Iterator[SourceRow]:
    """Yield a text file's documents with the line number of their start; blank ones are skipped."""
    # The file was opened with newline="", and separators are written with \n.
    text = text.replace("\r\n", "\n")
    line = 1
    for document in text.split(separator) if separator else [text]:
        if document.strip():
            first_line = line + document[: len(document) - len(document.lstrip())].count("\n")
            yield SourceRow({"text": document.strip("\n")}, f"{path}:{first_line}")
        line += document.count("\n") + (separator or "").count("\n")


def _read_text_file(path: Path, stream: IO[str], name: str) -> list[SourceRow]:
    if name.endswith((".csv", ".tsv")):
        return list(_read_csv(path, stream, "\t" if name.endswith(".tsv") else ","))
    if name.endswith(".jsonl"):
        return list(_read_jsonl(path, stream))
    return _read_json(path, stream)


def _read_jsonl(path: Path, stream: IO[str]) -> Iterator[SourceRow]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        location = f"{path}:{number}"
        try:
            # Without the line feed, after which Python counts columns from 1 again.
            value = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            actual = f"{error.msg} at column {error.colno}: {line.strip()[:60]!r}"
            raise UserError(Problem(location, actual, "one JSON object per line")) from error
        yield SourceRow(_check_object(value, location), location)


def _read_json(path: Path, stream: IO[str]) -> list[SourceRow]:
    text = stream.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        repair = "rename it to .jsonl if it has one object per line" if error.msg == "Extra data" else ""
        actual = f"{error.msg} at column {error.colno}"
        raise UserError(
            Problem(f"{path}:{error.lineno}", actual, "a JSON array of objects", repair)
        ) from error
    if not isinstance(value, list):
        raise UserError(Problem(str(path), f"a JSON {type(value).__name__}", "a JSON array of objects"))
    return [
        SourceRow(_check_object(entry, f"{path}:[{i}]"), f"{path}:[{i}]") for i, entry in enumerate(value)
    ]


def _check_object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(Problem(location, f"found {str(value)[:60]!r}", "a JSON object with named columns"))
    return value


def _read_csv(path: Path, stream: IO[str], delimiter: str) -> Iterator[SourceRow]:
    # strict: a stray quote is an error, and does not silently become part of a field.
    reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
    line = 0
    # The line of a record's start: quoted fields may contain line feeds, so line_num is that of its end.
    try:
        names = _check_header(path, reader.fieldnames or [])
        line = reader.line_num + 1
        for columns in reader:
            if None in columns or None in columns.values():
                # DictReader collects extra fields under None and fills missing ones with None.
                actual = f"the number of fields differs from the header ({len(names)})"
                repair = "put quotes around text that contains the separator"
                raise UserError(Problem(f"{path}:{line}", actual, f"columns {', '.join(names)}", repair))
            yield SourceRow(dict(columns), f"{path}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        repair = "double the quotes inside a quoted field"
        raise UserError(Problem(f"{path}:{line}", str(error), "a row of quoted fields", repair)) from error


def _check_header(path: Path, fields: Sequence[str]) -> list[str]:
    names = list(fields)
    duplicates = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if duplicates:
        actual = f"duplicate column '{duplicates[0]}' in the header"
        raise UserError(Problem(f"{path}:1", actual, "unique column names"))
    return names


def _read_parquet(path: Path) -> list[SourceRow]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(Problem(str(path), _first_line(error), "a Parquet file")) from error
    return [SourceRow(columns, f"{path}:row {i + 1}") for i, columns in enumerate(table.to_pylist())]


def _load_hub_dataset(name: str, split: str, revision: str | None) -> "datasets.Dataset":
    import datasets

    repository, _, subset = name.partition(":")
    try:
        return datasets.load_dataset(repository, subset or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = f"dataset '{name}', split '{split}'"
        actual = f"cannot be loaded from the Hub: {_first_line(error)}"
        repair = "check name, split and network; or use a local file: --data my.jsonl"
        raise UserError(Problem(where, actual, "a dataset on the Hub", repair)) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]


def data_files(path: Path, text_format: TextFormat | None = None) -> list[Path]:
    """Return a file, or a folder's data files in alphabetical order; text files only with ``text_format``.

    With ``text_format`` subfolders are included, except hidden ones.

    Raises:
        UserError: the file type is unknown, or the folder has no data file.
    """
    suffixes = (*DATA_SUFFIXES, *TEXT_SUFFIXES) if text_format is not None else DATA_SUFFIXES
    expected = f"files ending in {', '.join(suffixes)}"
    if path.is_file():
        if path.name.lower().endswith(suffixes):
            return [path]
        raise UserError(Problem(str(path), "unknown file type", expected))
    candidates = _walk_visible(path) if text_format is not None else path.iterdir()
    files = sorted(file for file in candidates if file.is_file() and file.name.lower().endswith(suffixes))
    if not files:
        raise UserError(Problem(str(path), "a folder without data files", expected))
    return files


def _walk_visible(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder, except hidden files and folders."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def is_text_file(path: Path) -> bool:
    """Return True if a file is plain text, and not rows."""
    return path.name.lower().endswith(TEXT_SUFFIXES)


def data_fingerprint(settings: DataSettings) -> str:
    """Return a digest of a data section's sources: files by content, Hub datasets by name and revision."""
    text_format = settings.text_format
    digests = [source_fingerprint(settings.source, revision=settings.revision, text_format=text_format)]
    digests += [
        source_fingerprint(entry.source, revision=entry.revision, text_format=text_format)
        for entry in settings.mix or []
    ]
    if isinstance(settings.held_out, str):
        digests.append(source_fingerprint(settings.held_out, text_format=text_format))
    return _digest_json(digests)


def source_fingerprint(
    source: str | list[dict[str, Any]] | None,
    *,
    revision: str | None = None,
    text_format: TextFormat | None = None,
) -> str:
    """Return a digest of a source without parsing it: content of local files, name of Hub datasets."""
    if not isinstance(source, str) or (path := local_path(source)) is None:
        return _digest_json([source, revision])
    digest = hashlib.sha256()
    # Contents only: renaming or moving the files does not change a run's name.
    for file in data_files(path, text_format):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _digest_json(content: Any) -> str:
    # default=str: rows given in Python may hold values that JSON lacks, such as dates.
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
