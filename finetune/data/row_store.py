"""Rows outside of Python's memory: pickled in a temporary file, decoded one at a time.

A conversation of Python objects takes about 2 KB besides its text. A million of them would take more memory
than their tokens.
"""

import hashlib
import json
import pickle
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from data_templates.segments import Message
from finetune.recipe.disk import storage_error


class LocatedText(Protocol):
    """A row with a text key (equal keys mean duplicates) and a location (``file:line``)."""

    @property
    def text_key(self) -> object:
        """Return roles and texts, as JSON data: two rows with equal ones are duplicates."""

    @property
    def location(self) -> str:
        """Return the row's location (``file:line``)."""


RowT = TypeVar("RowT", bound=LocatedText)
"""A conversation, a comparison or a prompt."""

message_values = attrgetter(*(field.name for field in fields(Message)))
"""Returns all fields of a message, in order: JSON data."""

MAX_MEMORY = 32 * 2**20
"""Bytes that a store keeps in memory; more go to a temporary file, which is deleted with the store."""

TEMPORARY_REPAIR = "or set TMPDIR to a folder on another disk: rows are kept there while they are read"


def text_digest(key: object) -> int:
    """Return 64 bits of a digest of JSON data: equal texts have equal digests.

    Two of a million different texts collide with a probability of 3e-8.
    """
    text = json.dumps(key, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Rows(Sequence[RowT], Generic[RowT]):
    """Some rows of a store, or of several one after the other; a row may occur several times."""

    def __init__(
        self, stores: "Sequence[RowStore[RowT]]", ids: "NDArray[np.int64] | Sequence[int] | None" = None
    ) -> None:
        """Take the rows with these indices into the concatenated stores, or all."""
        self._stores = stores
        self._starts = [0, *accumulate(map(len, stores))]
        self.ids = np.arange(self._starts[-1]) if ids is None else np.asarray(ids, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> RowT: ...

    @overload
    def __getitem__(self, index: slice) -> "Rows[RowT]": ...

    def __getitem__(self, index: "int | slice") -> "RowT | Rows[RowT]":
        return (
            self.take(np.arange(len(self))[index]) if isinstance(index, slice) else self._row(self.ids[index])
        )

    def __iter__(self) -> Iterator[RowT]:
        return map(self._row, self.ids.tolist())

    def _row(self, index: int) -> RowT:
        store = bisect_right(self._starts, index) - 1
        return self._stores[store].row(int(index) - self._starts[store])

    def take(self, ids: "NDArray[np.int64] | Sequence[int] | array[int]") -> "Rows[RowT]":
        """Return the rows at these positions."""
        return Rows(self._stores, self.ids[np.asarray(ids, dtype=np.int64)])

    @staticmethod
    def concatenate(parts: "Sequence[Rows[RowT]]") -> "Rows[RowT]":
        """Return the rows of all parts, one part after the other."""
        stores = [store for part in parts for store in part._stores]
        starts = [0, *accumulate(part._starts[-1] for part in parts)]
        return Rows(
            stores, np.concatenate([part.ids + start for part, start in zip(parts, starts, strict=False)])
        )

    @property
    def text_digests(self) -> NDArray[np.uint64]:
        """Digest of each row's text key; equal ones mean duplicates."""
        return np.concatenate([store.text_digests for store in self._stores])[self.ids]


class RowStore(Generic[RowT]):
    """An append-only list of rows. Each access decodes the row anew: equal, but not the same object."""

    def __init__(self, rows: Iterable[RowT] = ()) -> None:
        """Store the rows."""
        self._file = SpooledTemporaryFile(max_size=MAX_MEMORY)  # noqa: SIM115  it lives as long as the store
        self._offsets, self._digests = array("q", [0]), array("Q")
        for row in rows:
            self.append(row)

    def append(self, row: RowT) -> None:
        """Append a row.

        Raises:
            StorageError: the disk of temporary files is full.
        """
        record = pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            self._file.seek(self._offsets[-1])
            self._file.write(record)
        except OSError as error:
            raise self._lost(error) from error
        self._offsets.append(self._offsets[-1] + len(record))
        self._digests.append(text_digest(row.text_key))

    def __len__(self) -> int:
        return len(self._digests)

    def row(self, index: int) -> RowT:
        """Return row number ``index``."""
        start, end = self._offsets[index : index + 2]
        # The seek writes what is still buffered.
        try:
            self._file.seek(start)
        except OSError as error:
            raise self._lost(error) from error
        # Only what this process has pickled itself is ever unpickled.
        row: RowT = pickle.loads(self._file.read(end - start))
        return row

    def rows(self) -> Rows[RowT]:
        """Return all rows as a sequence."""
        return Rows([self])

    def _lost(self, error: OSError) -> Exception:
        """Return the error of a temporary file that cannot be written, and close the file."""
        # Python would try again to write the rest when it deletes the file, and print that error too.
        with suppress(OSError):
            self._file.close()
        # Not gettempdir(): it writes a file to find a folder, and there may be none with room.
        where = Path(tempfile.tempdir) if tempfile.tempdir else "the folder of temporary files"
        return storage_error(error, where, repair=TEMPORARY_REPAIR) or error

    @property
    def text_digests(self) -> NDArray[np.uint64]:
        """Digest of each row's text key."""
        # A copy: the store may still grow.
        return np.array(self._digests, dtype=np.uint64)


class TextColumn(Sequence[str]):
    """Texts as UTF-8 in one array, in memory or mapped from a file."""

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """Text i is the bytes of ``data`` from ``offsets[i]`` to ``offsets[i + 1]``."""
        self.data, self.offsets = data, offsets

    @staticmethod
    def of(texts: Iterable[str]) -> "TextColumn":
        """Encode texts."""
        builder = TextBuilder()
        for text in texts:
            builder.append(text)
        return builder.column()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __eq__(self, other: object) -> bool:
        """Equal to every sequence of the same texts."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: "int | slice") -> "str | list[str]":
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        return (
            self.data[self.offsets[index] : self.offsets[index + 1]]
            .tobytes()
            .decode("utf-8", "surrogatepass")
        )


class TextBuilder:
    """Collects the texts of a column."""

    def __init__(self) -> None:
        self._data, self._offsets = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        """Append a text."""
        # A file name whose bytes are not UTF-8 has surrogates in Python.
        self._data += text.encode("utf-8", "surrogatepass")
        self._offsets.append(len(self._data))

    def column(self) -> TextColumn:
        """Return the column; no text can be appended afterwards."""
        return TextColumn(as_array(self._data, np.uint8), as_array(self._offsets, np.int64))


def as_array(buffer: "array[int] | array[float] | bytearray", dtype: type[np.generic]) -> NDArray[Any]:
    """Return a buffer as an array without copying it; it can no longer grow."""
    # frombuffer refuses an empty buffer.
    return np.frombuffer(buffer, dtype=dtype) if len(buffer) else np.zeros(0, dtype=dtype)
