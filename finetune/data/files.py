"""Which files a source is made of, and a digest of what they hold; nothing heavy is imported for it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.recipe.errors import Problem, UserError
from finetune.recipe.paths import DATA_SUFFIXES, local_path
from finetune.recipe.settings import DataSettings


def data_files(path: Path) -> list[Path]:
    """Return a file, or a folder's data files in alphabetical order.

    Raises:
        UserError: the file is of an unknown kind, or the folder holds no data file.
    """
    expected = f"files ending in {', '.join(DATA_SUFFIXES)}"
    if path.is_file():
        if _is_data(path):
            return [path]
        raise UserError(Problem(str(path), "unknown kind of file", expected))
    files = sorted(file for file in path.iterdir() if file.is_file() and _is_data(file))
    if not files:
        raise UserError(Problem(str(path), "a folder without data files", expected))
    return files


def data_fingerprint(settings: DataSettings) -> str:
    """Return a digest of the content that a data section names: files by content, hub sets by name."""
    sources = [source_fingerprint(settings.source, revision=settings.revision)]
    sources += [source_fingerprint(part.source, revision=part.revision) for part in settings.mix or []]
    if isinstance(settings.held_out, str):
        sources.append(source_fingerprint(settings.held_out))
    return _sha256(sources)


def source_fingerprint(source: str | list[dict[str, Any]] | None, *, revision: str | None = None) -> str:
    """Return a digest of a source without reading its rows: content of local files, name of hub data."""
    if not isinstance(source, str) or (path := local_path(source)) is None:
        return _sha256([source, revision])
    digest = hashlib.sha256()
    for file in data_files(path):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(DATA_SUFFIXES)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
