"""Stream rows with their locations from a Hub dataset, JSON, CSV, Parquet or text files, a folder or a list.

No heavy imports: the planner reads rows without torch.
"""

import csv
import hashlib
import json
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.data.files import Source, data_files, is_text_file, open_text
from finetune.recipe.discovery import local_path, looks_local
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import TextFormat

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
"""Returns the indices of the rows to use, ascending, given the number of rows."""

JSON_CHUNK = 2**20
"""Characters of a JSON array that are read at a time."""


def read_source(source: Source, *, text_format: TextFormat | None = None) -> list[SourceRow]:
    """Return the rows of a source as a list; raises as ``iter_source`` does."""
    return list(iter_source(source, text_format=text_format))


def iter_source(
    source: Source,
    *,
    split: str = "train",
    revision: str | None = None,
    row_selector: RowSelector | None = None,
    text_format: TextFormat | None = None,
) -> Iterator[SourceRow]:
    """Yield the rows of a source, reading files as streams.

    Args:
        source: Hub id (``owner/name``, or ``owner/name:subset``), file (``.json .jsonl .csv .tsv .parquet``,
            ``.gz`` too), folder of such files, or rows.
        split: split of a Hub dataset.
        revision: revision of a Hub dataset.
        row_selector: selects the rows to yield; None yields all. Of a Hub dataset only these are read, files
            are read twice.
        text_format: how ``.txt`` and ``.md`` files become rows with a ``text`` column; None refuses them.

    Raises:
        UserError: the source cannot be read, or has no rows; the message names the file and line.
    """
    if isinstance(source, str) and local_path(source) is None:
        rows = _iter_hub_dataset(source, split, revision, row_selector)
    else:
        rows = _iter_local(source, text_format)
        if row_selector is not None:
            # Counted before selecting; the rows are not kept, as a large file would not fit into memory.
            row_ids = row_selector(sum(1 for _ in rows))
            rows = _at_indices(_iter_local(source, text_format), row_ids)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        where = source if isinstance(source, str) else "data.source"
        raise UserError(Problem(where, "no rows", "at least one row"))


def _iter_local(source: Source, text_format: TextFormat | None) -> Iterator[SourceRow]:
    if isinstance(source, list):
        for index, entry in enumerate(source, 1):
            yield SourceRow(_check_object(entry, f"row {index}"), f"row {index}")
        return
    path = local_path(source)
    assert path is not None
    for file in data_files(path, text_format):
        yield from _iter_file(file, text_format)


def _at_indices(rows: Iterator[SourceRow], row_ids: Sequence[int]) -> Iterator[SourceRow]:
    """Yield the rows at ascending indices; an index that occurs k times yields its row k times."""
    wanted = iter(row_ids)
    next_id = next(wanted, None)
    for index, row in enumerate(rows):
        while next_id == index:
            yield row
            next_id = next(wanted, None)
        if next_id is None:
            return


def _iter_hub_dataset(
    source: str, split: str, revision: str | None, row_selector: RowSelector | None
) -> Iterator[SourceRow]:
    if looks_local(source):
        repair = "check the path; a Hub dataset is named owner/name"
        raise UserError(Problem(source, "no such file or folder", "an existing path", repair))
    table = _load_hub_dataset(source, split, revision)
    row_ids = range(len(table)) if row_selector is None else row_selector(len(table))
    for row_id, columns in zip(row_ids, table.select(row_ids), strict=True):
        yield SourceRow(dict(columns), f"{source}[{split}] row {row_id + 1}")


def _iter_file(path: Path, text_format: TextFormat | None) -> Iterator[SourceRow]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _iter_parquet(path)
        return
    try:
        with open_text(path) as stream:
            try:
                yield from _iter_text_file(path, stream, name.removesuffix(".gz"), text_format)
            except (UserError, UnicodeDecodeError):
                # Damage of a compressed file may look like a bad row before its checksum is reached.
                while name.endswith(".gz") and stream.buffer.read(JSON_CHUNK):
                    pass
                raise
    except UnicodeDecodeError as error:
        repair = f"if it is Korean Windows text: iconv -f cp949 -t utf-8 {path.name}"
        raise UserError(Problem(str(path), f"not UTF-8: {error}", "UTF-8 text", repair)) from error
    except (OSError, EOFError, zlib.error) as error:
        expected = "a complete gzip file" if name.endswith(".gz") else "a readable file"
        raise UserError(Problem(str(path), f"cannot be read: {error}", expected)) from error


def _iter_text_file(
    path: Path, stream: IO[str], name: str, text_format: TextFormat | None
) -> Iterator[SourceRow]:
    if text_format is not None and is_text_file(path):
        return _split_documents(path, stream.read(), text_format.separator)
    if name.endswith((".csv", ".tsv")):
        return _iter_csv(path, stream, "\t" if name.endswith(".tsv") else ",")
    if name.endswith(".jsonl"):
        return _iter_jsonl(path, stream)
    return _iter_json_array(path, stream)


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


def _iter_jsonl(path: Path, stream: IO[str]) -> Iterator[SourceRow]:
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


def _iter_json_array(path: Path, stream: IO[str]) -> Iterator[SourceRow]:
    """Yield the objects of a JSON array as they are decoded."""
    buffer = JsonBuffer(stream)
    if buffer.next_character() != "[":
        raise _json_error(path, stream)
    buffer.skip(1)
    index = 0
    while (character := buffer.next_character()) != "]" or index == 0:
        if character == "]":
            break
        if index and character == ",":
            buffer.skip(1)
        elif index:
            raise _json_error(path, stream)
        try:
            value = buffer.next_value()
        except json.JSONDecodeError:
            raise _json_error(path, stream) from None
        location = f"{path}:[{index}]"
        yield SourceRow(_check_object(value, location), location)
        index += 1
    buffer.skip(1)
    if buffer.next_character():
        raise _json_error(path, stream)


class JsonBuffer:
    """A window of a JSON text that is read as a stream; ``position`` is that of the next character."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream, self.text, self.position, self.ended = stream, "", 0, False
        self.decoder = json.JSONDecoder()

    def next_character(self) -> str:
        """Skip white space and return the next character, "" at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text) or not self._read_more():
                return self.text[self.position : self.position + 1]

    def skip(self, count: int) -> None:
        """Skip characters."""
        self.position += count

    def next_value(self) -> Any:
        """Decode the next value.

        Raises:
            json.JSONDecodeError: it is not JSON.
        """
        self.next_character()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError:
                # Perhaps the rest has not been read yet.
                if not self._read_more():
                    raise
                continue
            # A number may go on in what has not been read yet.
            if end < len(self.text) or not self._read_more():
                self.position = end
                return value

    def _read_more(self) -> bool:
        """Read at least as much as the window holds, so that a long value is not decoded too often."""
        if self.ended:
            return False
        rest = self.text[self.position :]
        chunk = self.stream.read(max(JSON_CHUNK, len(rest)))
        self.ended = not chunk
        self.text, self.position = rest + chunk, 0
        return bool(chunk)


def _json_error(path: Path, stream: IO[str]) -> UserError:
    """Return the error of a file that is no JSON array, with its line as Python's decoder counts it."""
    stream.seek(0)
    try:
        value = json.loads(stream.read().removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        repair = "rename it to .jsonl if it has one object per line" if error.msg == "Extra data" else ""
        actual = f"{error.msg} at column {error.colno}"
        return UserError(Problem(f"{path}:{error.lineno}", actual, "a JSON array of objects", repair))
    return UserError(Problem(str(path), f"a JSON {type(value).__name__}", "a JSON array of objects"))


def _check_object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(Problem(location, f"found {str(value)[:60]!r}", "a JSON object with named columns"))
    return value


def _iter_csv(path: Path, stream: IO[str], delimiter: str) -> Iterator[SourceRow]:
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


def _iter_parquet(path: Path) -> Iterator[SourceRow]:
    from pyarrow import ArrowException, parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for columns in batch.to_pylist():
                    index += 1
                    yield SourceRow(columns, f"{path}:row {index}")
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(Problem(str(path), _first_line(error), "a Parquet file")) from error


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


def hub_fingerprint(name: str, split: str, revision: str | None) -> str:
    """Return a digest of a Hub dataset's content, which may change without a change of its name.

    Raises:
        UserError: it cannot be loaded.
    """
    table = _load_hub_dataset(name, split, revision)
    files = [Path(file["filename"]) for file in table.cache_files]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    # Without files it is in memory, and small.
    digest.update(b"" if files else pickle.dumps(table.to_list()))
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]
