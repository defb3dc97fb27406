"""Rows given in Python, stored in the run directory: its recipe.yaml names their files, relative to it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from finetune.data.files import Source, source_fingerprint
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.recipe import is_given_rows
from finetune.recipe.runs import ROWS_FOLDER
from finetune.recipe.settings import Section
from finetune.training.atomic_files import PARTIAL_NAME

SectionT = TypeVar("SectionT", bound=Section)


def row_sources(section: Section, prefix: str = "") -> Iterator[tuple[str, Source]]:
    """Yield the sources of rows that a section and its nested sections name, each with its recipe key.

    >>> from finetune.recipe.settings import DataSettings
    >>> list(row_sources(DataSettings(mix=[{"source": "a.csv"}], held_out="b.csv"), "data."))
    [('data.mix[0].source', 'a.csv'), ('data.held_out', 'b.csv')]
    """
    for name, value in section:
        key = f"{prefix}{name}"
        if isinstance(value, Section):
            yield from row_sources(value, f"{key}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from row_sources(item, f"{key}[{index}].")
        elif name in section.ROW_SOURCES and isinstance(value, Source):
            yield key, value


def other_row_digests(settings: Section) -> list[str]:
    """Return digests of rows that were given in Python and are no training data: PPO's, a retention set."""
    others = (source for key, source in row_sources(settings) if not key.startswith("data."))
    return [source_fingerprint(source) for source in others if is_given_rows(source)]


def store_rows(settings: SectionT, folder: Path) -> SectionT:
    """Write rows given in Python into ``folder/rows``, and return the settings that name their files.

    Files that are there already are named relative to the folder too. Files that no key names are deleted.

    Raises:
        UserError: a file cannot be written.
    """
    used: set[Path] = set()

    def file_of(key: str, source: Source) -> Source:
        if isinstance(source, PythonRows):
            file = copy_rows(source, folder / rows_file(key))
        else:
            file = Path(source)
            if file.parent.resolve() != (folder / ROWS_FOLDER).resolve():
                return source
        used.add(file.resolve())
        return f"{ROWS_FOLDER}/{file.name}"

    stored = _replaced(settings, file_of)
    for file in (folder / ROWS_FOLDER).glob("*"):
        if file.resolve() not in used:
            file.unlink()
    return stored


def _replaced(section: SectionT, replace: Callable[[str, Source], Source], prefix: str = "") -> SectionT:
    """Return a section with another value for each source of rows, also in nested sections."""
    update: dict[str, Any] = {}
    for name, value in section:
        key = f"{prefix}{name}"
        if isinstance(value, Section):
            update[name] = _replaced(value, replace, f"{key}.")
        elif isinstance(value, list):
            update[name] = [
                _replaced(item, replace, f"{key}[{index}].") if isinstance(item, Section) else item
                for index, item in enumerate(value)
            ]
        elif name in section.ROW_SOURCES and isinstance(value, Source):
            update[name] = replace(key, value)
    return section.model_copy(update=update)


def rows_file(key: str) -> Path:
    """Return the file of the rows of a recipe key, relative to the folder of a run or of a pipeline.

    >>> str(rows_file("data.mix[1].source"))
    'rows/data.mix-1.source.jsonl'
    """
    return Path(ROWS_FOLDER) / f"{key.replace('[', '-').replace(']', '')}.jsonl"


def copy_rows(rows: PythonRows, file: Path) -> Path:
    """Copy rows to a file that appears under its name when it is complete; return the file.

    Raises:
        UserError: it cannot be written.
    """
    partial = file.with_name(PARTIAL_NAME.format(file.name))
    try:
        file.parent.mkdir(exist_ok=True)
        shutil.copyfile(rows.path, partial)
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        actual = f"{rows.num_bytes:,} bytes of rows cannot be written: {error.strerror}"
        raise UserError(Problem(str(file), actual, "space for the rows", "choose another --out")) from error
    return file
