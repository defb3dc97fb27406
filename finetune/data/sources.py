"""Stream rows with their locations from a Hub dataset, files, a folder, or rows given in Python.

No heavy imports: the planner reads rows without torch.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.files import (
    Note,
    Source,
    data_files,
    first_line,
    ignore,
    is_saved_dataset,
    saved_dataset_files,
)
from finetune.data.readers import SourceRow, iter_file
from finetune.recipe.discovery import local_path, looks_local
from finetune.recipe.disk import is_write_error, storage_error
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.hub import HubRepository, reach_hub
from finetune.recipe.python_rows import PythonRows, row_location
from finetune.recipe.settings import TextFormat

if TYPE_CHECKING:
    import datasets

RowSelector = Callable[[int], Sequence[int]]
"""Returns the indices of the rows to use, ascending, given the number of rows."""


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
    key: str = "data.source",
    note: Note = ignore,
) -> Iterator[SourceRow]:
    """Yield the rows of a source, reading files as streams.

    Args:
        source: Hub id (``owner/name``, or ``owner/name:subset``), file (``.json .jsonl .ndjson .csv .tsv
            .parquet``, ``.gz`` and ``.zst`` too), folder of such files or of a saved dataset, or Python's
            rows.
        split: split of a Hub dataset, or of a folder whose file names say their split.
        revision: revision of a Hub dataset.
        row_selector: selects the rows to yield; None yields all. Of a Hub dataset only these are read, files
            are read twice.
        key: recipe key of the source, for the locations of rows given in Python.
        text_format: how ``.txt`` and ``.md`` files become rows with a ``text`` column; None refuses them.
        note: receives what was detected in files, such as a separator or an encoding.

    Raises:
        UserError: the source cannot be read, or has no rows; the message names the file and line.
    """
    path = local_path(source) if isinstance(source, str) else None
    if isinstance(source, str) and path is None:
        rows = _iter_table(_load_hub_dataset(source, split, revision), f"{source}[{split}]", row_selector)
    elif path is not None and is_saved_dataset(path):
        rows = _iter_table(_load_saved_dataset(path, split), str(path), row_selector)
    else:
        rows = _iter_local(source, split, text_format, key, note)
        if row_selector is not None:
            # Counted before selecting; the rows are not kept, as a large file would not fit into memory.
            row_ids = row_selector(sum(1 for _ in rows))
            rows = _at_indices(_iter_local(source, split, text_format, key, ignore), row_ids)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        where = source if isinstance(source, str) else key
        raise UserError(Problem(where, "no rows", "at least one row"))


def _iter_local(
    source: Source, split: str, text_format: TextFormat | None, key: str, note: Note
) -> Iterator[SourceRow]:
    if isinstance(source, PythonRows):
        for number, columns in enumerate(source, 1):
            yield SourceRow(columns, row_location(key, number))
        return
    path = local_path(source)
    assert path is not None
    for file in data_files(path, text_format, split=split, note=note):
        yield from iter_file(file, text_format, note)


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


def _iter_table(
    table: "datasets.Dataset", name: str, row_selector: RowSelector | None
) -> Iterator[SourceRow]:
    row_ids = range(len(table)) if row_selector is None else row_selector(len(table))
    for row_id, columns in zip(row_ids, table.select(row_ids), strict=True):
        yield SourceRow(dict(columns), f"{name} row {row_id + 1}")


def _load_saved_dataset(path: Path, split: str) -> "datasets.Dataset":
    """Load a folder that `save_to_disk` wrote."""
    import datasets

    saved_dataset_files(path, split)  # raises if there is no such split
    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        expected = "a folder that save_to_disk wrote"
        raise UserError(Problem(str(path), f"cannot be loaded: {first_line(error)}", expected)) from error
    return table[split] if isinstance(table, datasets.DatasetDict) else table


def _load_hub_dataset(name: str, split: str, revision: str | None) -> "datasets.Dataset":
    import datasets

    if looks_local(name):
        repair = "check the path; a Hub dataset is named owner/name"
        raise UserError(Problem(name, "no such file or folder", "an existing path", repair))
    repository, _, subset = name.partition(":")
    reach_hub(HubRepository("dataset", repository, revision))
    try:
        return datasets.load_dataset(repository, subset or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if is_write_error(error):
            repair = "or point HF_HOME to a folder on another disk: the dataset is downloaded there"
            raise storage_error(error, datasets.config.HF_CACHE_HOME, repair=repair) or error from error
        where = f"dataset '{name}', split '{split}'"
        actual = f"cannot be loaded from the Hub: {first_line(error)}"
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
