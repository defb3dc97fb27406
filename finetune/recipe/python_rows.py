"""Rows given in Python in place of a file: a snapshot as JSON Lines, which every process of the run reads."""

import hashlib
import json
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from finetune.recipe.errors import Problem, SettingError
from finetune.recipe.python_tables import TableError, iter_rows
from finetune.recipe.python_values import (
    ValueNotStoredError,
    encode_row,
    instance_schema,
    text_json_schema,
)

PREFIX = "llm-align-rows-"


class RowsError(SettingError):
    """Rows that cannot be stored; ``row`` is the number of one, and ``column`` a path in it."""

    def __init__(
        self, actual: str, expected: str, repair: str = "", *, row: int | None = None, column: str = ""
    ) -> None:
        super().__init__(actual, expected, repair)
        self.row, self.column = row, column

    def problem(self, where: str) -> Problem:
        """Return the problem of rows that were given for a recipe key."""
        where = where if self.row is None else row_location(where, self.row)
        where += f": column '{self.column}'" if self.column else ""
        return Problem(where, self.actual, self.expected, self.repair)


def row_location(key: str, number: int) -> str:
    """Return the location of a row for messages; of several sources it names the recipe key.

    >>> row_location("data.source", 12), row_location("data.held_out", 3)
    ('row 12', 'row 3 of data.held_out')
    """
    return f"row {number}" if key == "data.source" else f"row {number} of {key}"


@dataclass(frozen=True)
class PythonRows:
    """A snapshot of a table, which may change afterwards or be read once only.

    Equal rows have equal files: columns are in alphabetical order, keys inside a value in their own.

    Attributes:
        sha256: of the file.
        num_rows: lines of the file.
        num_bytes: size of the file.
        path: a temporary file, deleted with the object or at the end of the process that made it.
    """

    sha256: str
    num_rows: int
    num_bytes: int
    path: Path = field(compare=False)

    @staticmethod
    def of(table: Any) -> "PythonRows":
        """Store the rows of a table: a list or a generator of dicts, a data frame, a dataset, an Arrow table.

        Raises:
            RowsError: it is no table, or one of its values cannot be written as JSON.
        """
        digest, count = hashlib.sha256(), 0
        with ExitStack() as undo:
            try:
                handle, name = tempfile.mkstemp(".jsonl", PREFIX)
                undo.callback(os.unlink, name)
                with open(handle, "wb") as stream:
                    for line in _encoded_rows(table):
                        digest.update(line)
                        stream.write(line)
                        count += 1
                size = os.path.getsize(name)
            except OSError as error:
                actual = f"cannot be stored in {tempfile.gettempdir()}: {error.strerror}"
                expected = "a writable folder with space for the rows"
                raise RowsError(actual, expected, "give a file, or set TMPDIR") from error
            undo.pop_all()
        stored = PythonRows(digest.hexdigest(), count, size, Path(name))
        weakref.finalize(stored, _remove, stored.path, os.getpid())
        return stored

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows."""
        with self.path.open(encoding="utf-8") as stream:
            yield from map(json.loads, stream)

    def __str__(self) -> str:
        """Return the text that stands for the rows where a recipe is shown."""
        return f"<{self.num_rows} rows given in Python, {self.sha256[:16]}>"

    def __deepcopy__(self, memo: object) -> "PythonRows":
        # Nothing changes it, and a copy's file would be deleted with the original.
        return self

    __get_pydantic_core_schema__: ClassVar[Any] = classmethod(instance_schema)
    __get_pydantic_json_schema__: ClassVar[Any] = classmethod(text_json_schema)


def from_python(value: Any) -> Any:
    """Return the value of a key that names rows as recipes hold it: a path as text, a table as a snapshot.

    Raises:
        RowsError: the value is no table.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_recipe_value = value is None or isinstance(value, (str, bool, int, float, PythonRows))
    return value if is_recipe_value else PythonRows.of(value)


def pick_split(dataset: Mapping[str, Any], split: Any, *, key: str) -> Any:
    """Return one split of a dataset with splits.

    Raises:
        RowsError: it has no such split.
    """
    if split not in dataset:
        names = ", ".join(map(str, dataset))
        actual, repair = f"the dataset has no split '{split}'", f"{key}={next(iter(dataset), 'train')}"
        raise RowsError(actual, f"one of {names}", repair)
    return dataset[split]


def _encoded_rows(table: Any) -> Iterator[bytes]:
    """Yield the rows of a table as lines of JSON; raises RowsError."""
    number = 0
    try:
        for number, row in enumerate(iter_rows(table), 1):
            yield _encoded_row(row, number)
    except TableError as error:
        raise RowsError(error.actual, error.expected, error.repair) from error
    except RowsError:
        raise
    # Of the user's generator, or of a dataset that is streamed. Pydantic would take some for its own.
    except (OSError, ValueError, AssertionError) as error:
        actual = f"reading row {number + 1} raised {type(error).__name__}: {error}"
        raise RowsError(actual, "rows that can be read") from error


def _encoded_row(row: Any, number: int) -> bytes:
    if not isinstance(row, Mapping):
        repair = "[{'text': text} for text in texts]" if isinstance(row, str) else ""
        raise RowsError(f"found {_described(row)}", "a dict of named columns", repair, row=number)
    try:
        return encode_row(row)
    except ValueNotStoredError as error:
        repair = f"leave column '{error.column}' out" if error.is_foreign else ""
        raise RowsError(error.actual, error.expected, repair, row=number, column=error.path) from error
    except RecursionError as error:
        expected = "a few levels of lists and dicts"
        raise RowsError("values nested too deeply", expected, row=number) from error


def _described(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _remove(path: Path, process: int) -> None:
    # A forked process has the object too, and not the file.
    if os.getpid() == process:
        path.unlink(missing_ok=True)
