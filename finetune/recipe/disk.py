"""Errors of files that cannot be written (disk full or read-only, folder gone), check of free space."""

import errno
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.recipe.errors import Problem, UserError

RESUMES = "then run the same command again: it resumes from the last complete checkpoint"
OUTPUT_REPAIR = "or write to another disk"
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write (ulimit -f)",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ENOENT: "the folder is gone",
    errno.ENOTDIR: "the folder is gone",
    errno.ESTALE: "the network disk is gone",
    errno.ENOTCONN: "the network disk is gone",
    errno.EIO: "the disk reports an input/output error",
}
FULL = (errno.ENOSPC, errno.EDQUOT)
UNAMBIGUOUS = (*FULL, errno.EFBIG, errno.EROFS)
"""Error numbers that only a write has."""
UNNUMBERED = re.compile(
    r"inline_container\.cc|PytorchStreamWriter|iostream error|Parent directory .* does not exist"
    r"|\d+ requested and \d+ written"
)
"""Errors of writes by torch and numpy, which keep no error number."""
RUST_ERROR = re.compile(r"\(os error (\d+)\)")


class StorageError(UserError):
    """A file cannot be written: the disk is full or read-only, or the folder is gone."""


def storage_error(
    error: BaseException, where: str | Path, *, needed: int = 0, repair: str = RESUMES
) -> StorageError | None:
    """Return the error of a write to report, None if it is of another kind.

    Args:
        error: what a library raised while it wrote.
        where: the file or folder that was written; text for what is no file on a disk.
        needed: its size in bytes, 0 if it is not known.
        repair: what to do once there is room.
    """
    if isinstance(error, StorageError):
        return error
    number = _error_number(error, Path(where))
    if number not in REASONS or (number not in UNAMBIGUOUS and not _is_near(error, Path(where).parent)):
        return None
    actual, expected, remedy = REASONS[number], "a writable folder", "make it writable"
    if number in FULL:
        # Standard output, say, has no folder to ask.
        sizes = [f"{format_size(free_bytes(where))} free"] if isinstance(where, Path) else []
        sizes += [f"about {format_size(needed)} needed"] if needed else []
        actual = ": ".join(filter(None, (actual, ", ".join(sizes))))
        expected, remedy = "room for the file", "free some space"
    if number in (errno.ENOENT, errno.ENOTDIR):
        remedy = "restore it, or choose another --out"
    return StorageError(Problem(str(where), actual, expected, f"{remedy}, {repair}"))


@contextmanager
def writing(where: str | Path, *, needed: int = 0, repair: str = RESUMES) -> Iterator[None]:
    """Report a write that fails inside the block.

    Args:
        where: the file or folder that is written.
        needed: its size in bytes, 0 if it is not known.
        repair: what to do once there is room.

    Raises:
        StorageError: the disk is full or read-only, or the folder is gone.
    """
    try:
        yield
    except Exception as error:  # torch, safetensors and tokenizers raise their own for a full disk
        if stored := storage_error(error, where, needed=needed, repair=repair):
            raise stored from error
        raise


@contextmanager
def writing_inside(
    folder: Path, *, file: Callable[[], Path] | None = None, needed: int = 0
) -> Iterator[None]:
    """Report writes of any library that fail inside the block, and leave all other errors as they are.

    Args:
        folder: where the block writes.
        file: returns the file that was written, for errors that do not name it; by default the folder.
        needed: the size of that file in bytes, 0 if it is not known.

    Raises:
        StorageError: the disk is full or read-only, or the folder is gone.
    """
    try:
        yield
    except Exception as error:  # as above
        named = _named_file(error)
        where = named or (file() if file else folder)
        size = 0 if named else needed
        is_write = is_write_error(error) or (named and _is_near(error, folder))
        if is_write and (stored := storage_error(error, where, needed=size)):
            raise stored from error
        raise


def is_write_error(error: BaseException) -> bool:
    """Return whether an error, wherever it was raised, can only be that of a write."""
    if isinstance(error, OSError) and error.errno:
        return error.errno in UNAMBIGUOUS
    return bool(UNNUMBERED.search(str(error))) or _rust_error_number(error) in UNAMBIGUOUS


def check_free_space(folder: Path, needed: int, *, what: str, repair: str) -> None:
    """Raise StorageError if a folder's disk has no room.

    Args:
        folder: where the files will be; it need not exist.
        needed: their size in bytes.
        what: what they are.
        repair: how to need less, or where else to write.
    """
    if (free := free_bytes(folder)) < needed:
        actual = f"{format_size(free)} free, {format_size(needed)} needed: {what}"
        raise StorageError(Problem(f"disk of {folder}", actual, "room for all of it", repair))


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds a path, which need not exist."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free


def format_size(nbytes: int) -> str:
    """Format bytes for a message.

    >>> [format_size(size) for size in (0, 1500, 3_000_000, 5 * 2**30)]
    ['0 KiB', '2 KiB', '2.9 MiB', '5.0 GiB']
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{-(-nbytes // 2**10)} KiB"


def _named_file(error: BaseException) -> Path | None:
    """Return the file that an error names."""
    name = error.filename if isinstance(error, OSError) else None
    return Path(os.fsdecode(name)) if isinstance(name, (str, bytes, os.PathLike)) else None


def _is_near(error: BaseException, folder: Path) -> bool:
    """Return False for an error that names a file outside of a folder: another file was not read, say."""
    named = _named_file(error)
    return named is None or named.absolute().is_relative_to(folder.absolute())


def _error_number(error: BaseException, where: Path) -> int:
    """Return the number of a write's error, 0 for another error."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if number := _rust_error_number(error):
        return number
    if not UNNUMBERED.search(str(error)):
        return 0
    # The disk tells what is wrong with it.
    folder = next((folder for folder in (where, where.parent) if folder.is_dir()), None)
    if folder is None:
        return errno.ENOENT
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return errno.EROFS
    is_limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if is_limited else errno.ENOSPC


def _rust_error_number(error: BaseException) -> int:
    """Return the error number in the text of an error of safetensors or tokenizers, 0 without one."""
    match = RUST_ERROR.search(str(error))
    return int(match[1]) if match else 0
