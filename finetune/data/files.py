"""Files of a source: which a folder has, how they are opened, and digests of their contents.

No heavy imports: the fingerprint of a run reads files and parses nothing.
"""

import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.recipe.discovery import DATA_SUFFIXES, TEXT_SUFFIXES, local_path
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings, TextFormat

Source = str | list[dict[str, Any]]
"""Hub id, file, folder, or the rows themselves."""


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
    source: Source | None,
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


def open_text(path: Path) -> io.TextIOWrapper:
    # utf-8-sig: files written on Windows may begin with a byte order mark. newline="" as csv demands.
    if path.name.lower().endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")
