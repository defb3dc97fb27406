"""Cache of tokens: a folder of ``.npy`` files, written atomically, verified and memory-mapped on reading."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.cache import unwritable_error

Arrays = dict[str, np.ndarray]
NOTES = "notes.json"
"""File of the notes and of the arrays' checksums."""
CHUNK_BYTES = 32 << 20
"""Bytes of an array that one thread hashes at a time."""


def read_mapped(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Return an entry's arrays, mapped from their files, and its notes.

    None if there is no entry, or if it is damaged: it is then written anew.
    """
    try:
        content = json.loads((path / NOTES).read_text(encoding="utf-8"))
        checksums, notes = content["checksums"], content["notes"]
        arrays = {name: _map_array(path / f"{name}.npy") for name in checksums}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A flipped bit in token ids would be trained on without a sign.
    return (arrays, notes) if {name: _checksum(arrays[name]) for name in arrays} == checksums else None


def write_mapped(path: Path, arrays: Arrays, notes: Mapping[str, Any]) -> None:
    """Write an entry atomically: to a partial folder that is then renamed.

    Raises:
        UserError: the folder is not writable, or the disk is full.
    """
    # One partial folder per process: jobs on other nodes may write the same key to a shared disk.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # A process with the same number may have been killed here, as in a container that starts again.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, values in arrays.items():
            np.save(partial / f"{name}.npy", values, allow_pickle=False)
        checksums = {name: _checksum(values) for name, values in arrays.items()}
        (partial / NOTES).write_text(json.dumps({"checksums": checksums, "notes": notes}), encoding="utf-8")
        # A damaged entry gives way to the new one.
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(values.nbytes for values in arrays.values())
        raise unwritable_error(path, error, needed=needed) from error


def _map_array(file: Path) -> np.ndarray:
    values: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return values


def _checksum(values: np.ndarray) -> str:
    """Return the digest of the digests of an array's chunks, which are hashed on all cores."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    chunks = [data[start : start + CHUNK_BYTES].data for start in range(0, len(data), CHUNK_BYTES)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib releases the interpreter's lock
        digests = pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks)
    return hashlib.sha256(b"".join(digests)).hexdigest()
