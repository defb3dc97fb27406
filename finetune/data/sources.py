"""Read rows with their locations from a Hub dataset, JSON, CSV, Parquet or text files, a folder or a list."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.data.files import data_files, is_text
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.paths import local_path, looks_local
from finetune.recipe.settings import Texts

if TYPE_CHECKING:
    import datasets

# A long document is one field; the default limit of 128 KiB is far below the fields of published datasets.
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: its columns and its location (``file:line``)."""

    columns: dict[str, Any]
    where: str


Wanted = Callable[[int], Sequence[int]]
"""Returns the indices of the rows to use, given the number of rows."""


def read_source(
    source: str | list[dict[str, Any]],
    *,
    split: str = "train",
    revision: str | None = None,
    wanted: Wanted = range,
    texts: Texts | None = None,
) -> list[Row]:
    """Read the rows of a source.

    Args:
        source: hub id (``owner/name``, or ``owner/name:subset``), file (``.json .jsonl .csv .tsv .parquet``,
            ``.gz`` too), folder of such files, or rows.
        split: split of a Hub dataset.
        revision: revision of a Hub dataset.
        row_selector: selects the rows to return, by default all; of a Hub dataset only these are read.
        text_format: how ``.txt`` and ``.md`` files become rows with a ``text`` column; None refuses them.

    Raises:
        UserError: the source cannot be read, or has no rows; the message names the file and line.
    """
    if isinstance(source, list):
        rows = [Row(_object(entry, f"row {i + 1}"), f"row {i + 1}") for i, entry in enumerate(source)]
    elif path := local_path(source):
        rows = [row for file in data_files(path, texts) for row in _read_file(file, texts)]
    elif looks_local(source):
        repair = "check the path; a Hub dataset is named owner/name"
        raise UserError(Problem(source, "no such file or folder", "an existing path", repair))
    else:
        table = _hub_table(source, split, revision)
        numbers = wanted(len(table))
        found = zip(numbers, table.select(numbers), strict=True)
        return _some([Row(dict(columns), f"{source}[{split}] row {i + 1}") for i, columns in found], source)
    numbers = wanted(len(rows))
    return _some(rows if len(numbers) == len(rows) else [rows[i] for i in numbers], source)


def _some(rows: list[Row], source: str | list[dict[str, Any]]) -> list[Row]:
    if not rows:
        where = source if isinstance(source, str) else "data.source"
        raise UserError(Problem(where, "no rows", "at least one row"))
    return rows


def _read_file(path: Path, texts: Texts | None) -> list[Row]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _read_parquet(path)
    try:
        with _open(path) as stream:
            if texts is not None and is_text(path):
                return list(_documents(path, stream.read(), texts.separator))
            return _read_text(path, stream, name.removesuffix(".gz"))
    except UnicodeDecodeError as error:
        repair = f"if it is Korean Windows text: iconv -f cp949 -t utf-8 {path.name}"
        raise UserError(Problem(str(path), f"not UTF-8: {error}", "UTF-8 text", repair)) from error
    except (OSError, EOFError, zlib.error) as error:
        expected = "a complete gzip file" if name.endswith(".gz") else "a readable file"
        raise UserError(Problem(str(path), f"cannot be read: {error}", expected)) from error


def _open(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        # Decompress everything first: gzip's checksum is at the end, and damage must not be read as text.
        content = io.BytesIO(gzip.decompress(path.read_bytes()))
        return io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    # utf-8-sig: files written on Windows may begin with a byte order mark. newline="" as csv demands.
    return path.open(encoding="utf-8-sig", newline="")


def _documents(path: Path, text: str, separator: str | None) -> Iterator[Row]:
    """Yield a text file's documents with the line number of their start; blank ones are skipped."""
    text = text.replace("\r\n", "\n")
    line = 1
    for part in text.split(separator) if separator else [text]:
        if part.strip():
            begins = line + part[: len(part) - len(part.lstrip())].count("\n")
            yield Row({"text": part.strip("\n")}, f"{path}:{begins}")
        line += part.count("\n") + (separator or "").count("\n")


def _read_text(path: Path, stream: IO[str], name: str) -> list[Row]:
    if name.endswith((".csv", ".tsv")):
        return list(_read_csv(path, stream, "\t" if name.endswith(".tsv") else ","))
    if name.endswith(".jsonl"):
        return list(_read_lines(path, stream))
    return _read_json(path, stream)


def _read_lines(path: Path, stream: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            found = f"{error.msg} at column {error.colno}: {line.strip()[:60]!r}"
            raise UserError(Problem(where, found, "one JSON object per line")) from error
        yield Row(_object(value, where), where)


def _read_json(path: Path, stream: IO[str]) -> list[Row]:
    text = stream.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        repair = "rename it to .jsonl if it has one object per line" if error.msg == "Extra data" else ""
        found = f"{error.msg} at column {error.colno}"
        raise UserError(
            Problem(f"{path}:{error.lineno}", found, "a JSON array of objects", repair)
        ) from error
    if not isinstance(value, list):
        raise UserError(Problem(str(path), f"a JSON {type(value).__name__}", "a JSON array of objects"))
    return [Row(_object(entry, f"{path}:[{i}]"), f"{path}:[{i}]") for i, entry in enumerate(value)]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(Problem(where, f"found {str(value)[:60]!r}", "a JSON object with named columns"))
    return value


def _read_csv(path: Path, stream: IO[str], delimiter: str) -> Iterator[Row]:
    reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
    line = 0
    # The line of a record's start: quoted fields may contain line feeds, so line_num is that of its end.
    try:
        names = _header(path, reader.fieldnames or [])
        line = reader.line_num + 1
        for columns in reader:
            if None in columns or None in columns.values():
                # DictReader collects extra fields under None and fills missing ones with None.
                found = f"the number of fields differs from the header ({len(names)})"
                repair = "put quotes around text that contains the separator"
                raise UserError(Problem(f"{path}:{line}", found, f"columns {', '.join(names)}", repair))
            yield Row(dict(columns), f"{path}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        repair = "double the quotes inside a quoted field"
        raise UserError(Problem(f"{path}:{line}", str(error), "a row of quoted fields", repair)) from error


def _header(path: Path, fields: Sequence[str]) -> list[str]:
    names = list(fields)
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        found = f"duplicate column '{twice[0]}' in the header"
        raise UserError(Problem(f"{path}:1", found, "unique column names"))
    return names


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(Problem(str(path), _first_line(error), "a Parquet file")) from error
    return [Row(columns, f"{path}:row {i + 1}") for i, columns in enumerate(table.to_pylist())]


def _hub_table(name: str, split: str, revision: str | None) -> "datasets.Dataset":
    import datasets

    repository, _, subset = name.partition(":")
    try:
        return datasets.load_dataset(repository, subset or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = f"dataset '{name}', split '{split}'"
        found = f"cannot be loaded from the Hub: {_first_line(error)}"
        repair = "check name, split and network; or use a local file: --data my.jsonl"
        raise UserError(Problem(where, found, "a dataset on the Hub", repair)) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]
