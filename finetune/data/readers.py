"""Readers of files: each yields the rows of a JSON, CSV, Parquet or text file, with their locations."""

import csv
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune.data.files import (
    Note,
    check_not_lfs_pointer,
    first_line,
    is_compressed,
    is_text_file,
    open_text,
    uncompressed_name,
)
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import TextFormat

# A long document is one field; the default limit of 128 KiB is far below the fields of published datasets.
csv.field_size_limit(2**31 - 1)

JSON_CHUNK = 2**20
"""Characters of a JSON array that are read at a time."""

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
QUOTED = re.compile('"[^"]*"')


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a source: its columns and its location (``file:line``)."""

    columns: dict[str, Any]
    location: str


def iter_file(path: Path, text_format: TextFormat | None, note: Note) -> Iterator[SourceRow]:
    """Yield the rows of a file; ``note`` receives what was detected, such as a separator.

    Raises:
        UserError: the file cannot be read; the message names it and the line.
    """
    check_not_lfs_pointer(path)
    if uncompressed_name(path).endswith(".parquet"):
        yield from _iter_parquet(path)
        return
    try:
        with open_text(path, note) as stream:
            try:
                yield from _iter_text_file(path, stream, text_format, note)
            except (UserError, UnicodeDecodeError):
                # Damage of a compressed file may look like a bad row before its checksum is reached.
                while is_compressed(path) and stream.buffer.read(JSON_CHUNK):
                    pass
                raise
    except UnicodeDecodeError as error:
        repair = f"convert it: iconv -f ENCODING -t utf-8 {path.name}"
        raise UserError(Problem(str(path), f"not UTF-8: {error}", "UTF-8 text", repair)) from error
    except (OSError, EOFError, zlib.error) as error:
        expected = "a complete compressed file" if is_compressed(path) else "a readable file"
        raise UserError(Problem(str(path), f"cannot be read: {error}", expected)) from error


def _iter_text_file(
    path: Path, stream: IO[str], text_format: TextFormat | None, note: Note
) -> Iterator[SourceRow]:
    name = uncompressed_name(path)
    if text_format is not None and is_text_file(path):
        return _split_documents(path, stream.read(), text_format.separator)
    if name.endswith((".csv", ".tsv")):
        return _iter_csv(path, stream, note)
    if name.endswith((".jsonl", ".ndjson")):
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
        except (ValueError, RecursionError) as error:
            raise _beyond_limits(location, error) from error
        yield SourceRow(check_object(value, location), location)


def _iter_json_array(path: Path, stream: IO[str]) -> Iterator[SourceRow]:
    """Yield the objects of a JSON array as they are decoded."""
    buffer = JsonBuffer(stream)
    if buffer.next_character() != "[":
        raise _json_error(path)
    buffer.skip(1)
    index = 0
    while (character := buffer.next_character()) != "]" or index == 0:
        if character == "]":
            break
        if index and character == ",":
            buffer.skip(1)
        elif index:
            raise _json_error(path)
        try:
            value = buffer.next_value()
        except json.JSONDecodeError:
            raise _json_error(path) from None
        except (ValueError, RecursionError) as error:
            raise _beyond_limits(f"{path}:[{index}]", error) from error
        location = f"{path}:[{index}]"
        yield SourceRow(check_object(value, location), location)
        index += 1
    buffer.skip(1)
    if buffer.next_character():
        raise _json_error(path)


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


def _json_error(path: Path) -> UserError:
    """Return the error of a file that is no JSON array, with its line as Python's decoder counts it."""
    try:
        with open_text(path) as stream:
            value = json.loads(stream.read())
    except json.JSONDecodeError as error:
        repair = "rename it to .jsonl if it has one object per line" if error.msg == "Extra data" else ""
        actual = f"{error.msg} at column {error.colno}"
        return UserError(Problem(f"{path}:{error.lineno}", actual, "a JSON array of objects", repair))
    return UserError(Problem(str(path), f"a JSON {type(value).__name__}", "a JSON array of objects"))


def _beyond_limits(location: str, error: Exception) -> UserError:
    """Return the error of a value that is JSON, but that Python does not decode."""
    if isinstance(error, RecursionError):
        actual, expected = "values nested too deeply", "a JSON object with a few levels"
    else:
        limit = sys.get_int_max_str_digits()
        actual, expected = f"a number of more than {limit} digits", "a shorter number, or text in quotes"
    return UserError(Problem(location, actual, expected))


def check_object(value: Any, location: str) -> dict[str, Any]:
    """Return a row if it is an object with named columns; raises UserError."""
    if not isinstance(value, dict):
        raise UserError(Problem(location, f"found {str(value)[:60]!r}", "a JSON object with named columns"))
    return value


def _iter_csv(path: Path, stream: IO[str], note: Note) -> Iterator[SourceRow]:
    delimiter = _detect_delimiter(path, note)
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


def _detect_delimiter(path: Path, note: Note) -> str:
    """Return the separator of the header: the one of the suffix, or another one if the header lacks it."""
    expected = "\t" if uncompressed_name(path).endswith(".tsv") else ","
    # Opened once more: a compressed stream cannot be rewound.
    with open_text(path) as stream:
        header = QUOTED.sub("", stream.readline())
    counts = {delimiter: header.count(delimiter) for delimiter in DELIMITERS}
    detected = max(counts, key=lambda delimiter: counts[delimiter])
    if counts[expected] or not counts[detected]:
        return expected
    note(f"{path.name}: fields are separated by {DELIMITERS[detected]}")
    return detected


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
        raise UserError(Problem(str(path), first_line(error), "a Parquet file")) from error
