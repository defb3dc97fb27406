"""Disk cache of arrays (safetensors): atomic writes, and a checksum that is verified on reading."""

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

from finetune.recipe.disk import is_write_error, storage_error
from finetune.recipe.errors import Problem, UserError

NOTES_KEY = "report"
"""Key of the JSON notes in the safetensors metadata."""


class DamagedCacheError(Exception):
    """A cached file is unreadable or fails its checksum; the message names it."""


def cache_path(kind: str, key: str) -> Path:
    """Return the path of a cached file, by kind (``reference``) and key."""
    return user_cache_path("llm-align") / kind / f"{key}.safetensors"


@contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Lock a cached file, so that one process creates it while the others wait and then read it.

    Raises:
        UserError: the folder is not writable.
    """
    # Lock files are in a folder of their own: the cache folder has only arrays.
    lock_folder = path.parents[1] / "locks"
    try:
        lock_folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_folder / f"{path.stem}.lock")
        lock.acquire()
    except OSError as error:
        raise unwritable_error(path, error) from error
    try:
        yield
    finally:
        lock.release()


def read_cached(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Read a cached file's arrays and notes; None if there is no such file.

    Raises:
        DamagedCacheError: the file is unreadable or fails its checksum.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            notes: dict[str, Any] = json.loads((file.metadata() or {})[NOTES_KEY])
        arrays: dict[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise DamagedCacheError(f"{path}: unreadable") from error
    # safetensors checks the header only, and would return arrays with flipped bits.
    if notes.get("sha256") != _arrays_checksum(arrays):
        raise DamagedCacheError(f"{path}: checksum mismatch")
    return arrays, notes


def write_cached(path: Path, arrays: dict[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    """Write arrays and notes atomically: to a partial file that is then renamed.

    Raises:
        UserError: the folder is not writable.
    """
    # One partial file per process: jobs on other nodes may write the same key to a shared folder.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    metadata = json.dumps({**notes, "sha256": _arrays_checksum(arrays)})
    needed = sum(values.nbytes for values in arrays.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, partial, metadata={NOTES_KEY: metadata})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        if partial.is_file():
            partial.unlink()
        raise unwritable_error(path, error, needed=needed) from error


def unwritable_error(path: Path, error: Exception, *, needed: int = 0) -> UserError:
    """Return the error of a cache that cannot be written; ``needed`` is the size of its entry in bytes."""
    repair = "set data.cache=false, or point XDG_CACHE_HOME to another folder"
    if is_write_error(error) and (stored := storage_error(error, path, needed=needed, repair=repair)):
        return stored
    actual = f"cannot write the cache: {error}"
    return UserError(Problem(str(path.parent), actual, "a writable folder", repair))


def _arrays_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    # Sorted, as safetensors returns arrays in its own order.
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
