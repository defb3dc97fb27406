"""Arrays kept on the disk between runs: written in one move, with a checksum that is compared on reading."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from finetune.recipe.errors import Problem, UserError

NOTES = "report"
"""Where a file keeps its notes."""


class DamagedCacheError(Exception):
    """A kept file cannot be read, or does not hold what was written; the message names it."""


def cache_file(kind: str, key: str) -> Path:
    """Return where arrays of a kind (``tokens``) are kept under a key."""
    return user_cache_path("llm-align") / kind / f"{key}.safetensors"


@contextmanager
def made_once(path: Path) -> Iterator[None]:
    """Let one process at a time look for a file and make it; the others wait and find it.

    Raises:
        UserError: the folder cannot be written.
    """
    locks = path.parents[1] / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{path.stem}.lock")
        lock.acquire()
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def stored(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Return a file's arrays and notes, None where there is no such file.

    Raises:
        DamagedCacheError: the file is not what was written.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            notes: dict[str, Any] = json.loads((file.metadata() or {})[NOTES])
        arrays: dict[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise DamagedCacheError(f"{path}: unreadable") from error
    if notes.get("sha256") != _checksum(arrays):
        raise DamagedCacheError(f"{path}: other numbers than were written")
    return arrays, notes


def store(path: Path, arrays: dict[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    """Write arrays and notes.

    Raises:
        UserError: the folder cannot be written.
    """
    partial = path.with_suffix(f".{os.getpid()}.partial")
    written = json.dumps({**notes, "sha256": _checksum(arrays)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, partial, metadata={NOTES: written})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> UserError:
    repair = "data.cache=false, or XDG_CACHE_HOME names another folder"
    found = f"the cache cannot be written: {error}"
    return UserError(Problem(str(path.parent), found, "a folder that can be written", repair))


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
