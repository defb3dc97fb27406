"""Files of run and pipeline folders: a lock held while they are written, atomic writes, JSON Lines."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune.recipe.disk import RESUMES, is_write_error, storage_error, writing
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import LOCK_FILE

LOCK_TIMEOUT = 0.5
"""Seconds to wait for a lock: a reader that asks whether it is held has it for a moment."""
PARTIAL_NAME = ".{}.partial"
"""Temporary name of a file or folder until it is complete."""


@contextmanager
def locked_folder(path: Path, *, in_use: Problem, unwritable: Problem) -> Iterator[None]:
    """Create a folder and hold its lock inside the block.

    Args:
        path: the folder.
        in_use: the problem to report if another process holds the lock.
        unwritable: the problem to report if the folder cannot be written; the reason is appended to it.

    Raises:
        UserError: one of the two problems.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Two processes on the same folder are a mistake, and a run takes hours: do not wait for its end. The
        # lock dies with its process.
        lock = FileLock(path / LOCK_FILE, timeout=LOCK_TIMEOUT)
        lock.acquire()
    except Timeout as error:
        raise UserError(in_use) from error
    except OSError as error:
        if is_write_error(error) and (stored := storage_error(error, path)):
            raise stored from error
        raise UserError(replace(unwritable, actual=f"{unwritable.actual}: {error.strerror}")) from error
    try:
        yield
    finally:
        lock.release()


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file that appears under its name when it is complete.

    Raises:
        StorageError: the disk is full or read-only, or the folder is gone.
    """
    # A rename is atomic: neither a kill nor a concurrent reader sees half of a file.
    partial = path.with_name(PARTIAL_NAME.format(path.name))
    content = text.encode("utf-8")
    with writing(path, needed=len(content)):
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except OSError:
            # Half of a file takes room that the next write may need.
            if partial.is_file():
                partial.unlink()
            raise


@contextmanager
def atomic_folder(path: Path, name: str, *, repair: str = RESUMES) -> Iterator[Path]:
    """Yield a temporary folder that atomically becomes ``path/name`` on success; on an error it is deleted.

    Raises:
        StorageError: the disk is full or read-only, or the folder is gone.
    """
    partial = path / PARTIAL_NAME.format(name)
    shutil.rmtree(partial, ignore_errors=True)
    with writing(path / name, repair=repair):
        try:
            partial.mkdir()
            yield partial
            # os.replace does not replace a folder that has files.
            shutil.rmtree(path / name, ignore_errors=True)
            os.replace(partial, path / name)
        except Exception:  # whatever a library raises: half of a model takes room
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a JSON Lines file; empty if there is no such file.

    Raises:
        UserError: a line is damaged.
    """
    # Not splitlines: with ensure_ascii=False texts may hold U+2028, at which it would split too. The last
    # element is empty, or an entry that a kill truncated.
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [_parse_line(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(_damaged_line(path, number)) from error
    if not isinstance(entry, dict):
        raise UserError(_damaged_line(path, number))
    return entry


def _damaged_line(path: Path, number: int) -> Problem:
    repair = "delete that line; the same command then resumes the run"
    return Problem(f"{path}:{number}", "a damaged line", "a JSON object", repair)
