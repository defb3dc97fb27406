"""Tables of Python libraries as rows. No library is imported for it: whoever has a table has its library."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

CHUNK_ROWS = 1024
"""Rows of a data frame that are converted at a time."""

ROWS = "a file, a list of dicts, a data frame, a dataset or an Arrow table"
NAMED_ROWS = "[row] for one row, rows['train'] for a split, datasets.Dataset.from_dict(columns) for columns"


class ArrowStream(Protocol):
    """A table of any library that shares memory with Arrow: polars, pandas, pyarrow, duckdb."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """Return the table as a stream of Arrow record batches."""
        ...


class TableError(Exception):
    """A value that is no table of rows."""

    def __init__(self, actual: str, expected: str = ROWS, repair: str = "") -> None:
        super().__init__(actual)
        self.actual, self.expected, self.repair = actual, expected, repair


def library_of(value: Any) -> str:
    """Return the library of a value's class, or of the first of its bases with a reader; else "".

    >>> library_of([]), library_of(type("Frame", (), {"__module__": "pandas.core.frame"})())
    ('', 'pandas')
    """
    names = (base.__module__.partition(".")[0] for base in type(value).__mro__)
    return next((name for name in names if name in READERS), "")


def has_splits(value: Any) -> bool:
    """Return True for a dataset with splits (``datasets.DatasetDict``)."""
    return isinstance(value, Mapping) and library_of(value) == "datasets"


def iter_rows(table: Any) -> Iterator[Any]:
    """Return the rows of a table as dicts, as a stream.

    Raises:
        TableError: it is no table; also from the stream.
    """
    library = library_of(table)
    if library:
        return READERS[library](table)
    if hasattr(table, "__arrow_c_stream__"):
        return _iter_arrow(table)
    if reason := _not_rows(table):
        raise TableError(*reason)
    return iter(table)


def _not_rows(value: Any) -> tuple[str, str, str] | None:
    """Return found, expected and repair for a value that is no collection of rows."""
    actual = f"found {type(value).__name__}"
    if isinstance(value, Mapping):
        return f"{actual}, not rows", ROWS, NAMED_ROWS
    if isinstance(value, (bytes, bytearray, set, frozenset)):
        return actual, ROWS, ""
    if hasattr(value, "read"):
        return f"{actual}, an open file", ROWS, "give the path of the file"
    if callable(value) and not isinstance(value, Iterable):
        return f"{actual}, not its result", ROWS, "call it: data=rows()"
    # Not only Iterable: a torch Dataset has numbered items and no __iter__.
    return None if isinstance(value, Iterable) or hasattr(value, "__getitem__") else (actual, ROWS, "")


def _iter_frame(frame: Any) -> Iterator[Any]:
    """Yield the rows of a pandas data frame; missing cells are None."""
    if not hasattr(frame, "columns"):
        raise TableError(f"found pandas.{type(frame).__name__}", ROWS, "series.to_frame('text')")
    names = list(frame.columns)
    if duplicates := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise TableError(f"two columns named '{duplicates[0]}'", "unique column names")
    for start in range(0, len(frame), CHUNK_ROWS):
        cells = frame.iloc[start : start + CHUNK_ROWS].astype(object)
        # As objects: a column of numbers has no None.
        yield from cells.where(cells.notna(), None).to_dict("records")


def _iter_dataset(dataset: Any) -> Iterator[Any]:
    """Yield the rows of a dataset of the library datasets, also of a streamed one."""
    if has_splits(dataset):
        splits = ", ".join(map(str, dataset))
        raise TableError(
            f"a dataset with the splits {splits}", "one of its splits", f"data['{next(iter(dataset))}']"
        )
    # Formatted as tensors, a row would have no text.
    yield from dataset.with_format(None)


def _iter_arrow(table: ArrowStream) -> Iterator[Any]:
    import pyarrow

    try:
        for batch in pyarrow.RecordBatchReader.from_stream(table):
            yield from batch.to_pylist()
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise TableError(f"found {type(table).__name__}: {error}") from error


def _iter_pyarrow(table: Any) -> Iterator[Any]:
    import pyarrow

    # A single batch is no stream.
    is_batch = isinstance(table, pyarrow.RecordBatch)
    return _iter_arrow(pyarrow.Table.from_batches([table]) if is_batch else table)


READERS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "pandas": _iter_frame,
    "datasets": _iter_dataset,
    "pyarrow": _iter_pyarrow,
}
"""Readers by the library that defines a table's class."""
