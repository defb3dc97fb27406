"""Files of a source: which a folder has, how they are opened, and digests of their contents.

No heavy imports: the fingerprint of a run reads files and parses nothing.
"""

import codecs
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from finetune.recipe.discovery import DATA_SUFFIXES, TEXT_SUFFIXES, local_path
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.settings import DataSettings, TextFormat

Source = str | PythonRows
"""Hub id, file, folder, or rows given in Python."""

Note = Callable[[str], None]
"""Receives a line for the data report."""

COMPRESSED = (".gz", ".zst")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in file names that name a split, as the `datasets` library reads them (a subset)."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
UTF8 = "utf-8-sig"
"""UTF-8; files written on Windows may begin with a byte order mark."""
MIN_HANGUL = 0.8
"""Share of Hangul among the letters beyond ASCII, above which bytes that are not UTF-8 are read as cp949."""
SNIFFED_BYTES = 2**16
"""Bytes at the start of a file that decide its encoding."""


def ignore(_: str) -> None:
    """Take a note and do nothing with it."""


def data_files(
    path: Path, text_format: TextFormat | None = None, *, split: str = "train", note: Note = ignore
) -> list[Path]:
    """Return a file, or a folder's data files of a split in alphabetical order.

    Hidden files are ignored, and so are files whose name says another split. A folder without data files may
    have them in ``data/``, as clones of Hub datasets do. With ``text_format`` text files are data files, and
    subfolders are included.

    Raises:
        UserError: the file type is unknown, or the folder has no data file.
    """
    suffixes = (*DATA_SUFFIXES, *TEXT_SUFFIXES) if text_format is not None else DATA_SUFFIXES
    expected = f"files ending in {', '.join(suffixes)}"
    if path.is_file():
        if path.name.lower().endswith(suffixes):
            return [path]
        raise UserError(Problem(str(path), "unknown file type", expected))
    candidates = _files_in(path, suffixes, recursive=text_format is not None)
    if not candidates and (path / "data").is_dir():
        candidates = _files_in(path / "data", suffixes, recursive=False)
    if not candidates:
        raise UserError(Problem(str(path), "a folder without data files", expected))
    # A document may be called test-plan.md: its name says nothing about a split.
    files = [
        file for file in candidates if is_text_file(file) or split_of(file.relative_to(path)) in (None, split)
    ]
    others = [file.relative_to(path) for file in candidates if file not in files]
    if not files:
        splits = ", ".join(sorted({str(split_of(file)) for file in others}))
        repair = f"data.split={splits.split(', ')[0]}, or name a file"
        raise UserError(
            Problem(str(path), f"only files of split {splits}", f"files of split {split}", repair)
        )
    if others:
        names = ", ".join(map(str, others[:5])) + ("" if len(others) <= 5 else f" and {len(others) - 5} more")
        note(f"not used, as their names say another split than '{split}': {names}")
    return files


def split_of(file: Path) -> str | None:
    """Return the split that a file's name or folder says: train, validation or test; None if it says none.

    >>> split_of(Path("data/test-00000-of-00001.parquet")), split_of(Path("latest.jsonl"))
    ('test', None)
    """
    words = set(re.split("[^a-z]+", str(file.with_name(uncompressed_name(file))).lower()))
    # The last one wins: test/train_like.jsonl is unusual, train/validation.jsonl is a validation file.
    return next((split for split, names in reversed(SPLITS.items()) if words & set(names)), None)


def _files_in(folder: Path, suffixes: tuple[str, ...], *, recursive: bool) -> list[Path]:
    candidates = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(
        file
        for file in candidates
        if file.is_file()
        and file.name.lower().endswith(suffixes)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def is_text_file(path: Path) -> bool:
    """Return True if a file is plain text, and not rows."""
    return path.name.lower().endswith(TEXT_SUFFIXES)


def is_compressed(path: Path) -> bool:
    """Return True if a file's name says that it is compressed."""
    return path.name.lower().endswith(COMPRESSED)


def uncompressed_name(path: Path) -> str:
    """Return a file's name in lower case, without the suffix of a compression."""
    name = path.name.lower()
    return name.removesuffix(".gz").removesuffix(".zst")


def data_fingerprint(settings: DataSettings) -> str:
    """Return a digest of a data section's sources: files by content, Hub datasets by name and revision."""
    text_format = settings.text_format
    split = settings.split
    digests = [source_fingerprint(settings.source, settings.revision, split, text_format=text_format)]
    digests += [
        source_fingerprint(entry.source, entry.revision, entry.split or split, text_format=text_format)
        for entry in settings.mix or []
    ]
    if isinstance(settings.held_out, Source):
        digests.append(source_fingerprint(settings.held_out, None, split, text_format=text_format))
    return _digest_json(digests)


def source_fingerprint(
    source: Source | None,
    revision: str | None = None,
    split: str = "train",
    *,
    text_format: TextFormat | None = None,
) -> str:
    """Return a digest of a source without parsing it: content of local files, name of Hub datasets."""
    if isinstance(source, PythonRows):
        # The digest of the file that the run directory gets.
        return hashlib.sha256(bytes.fromhex(source.sha256)).hexdigest()
    if source is None or (path := local_path(source)) is None:
        return _digest_json([source, revision])
    digest = hashlib.sha256()
    # Contents only: renaming or moving the files does not change a run's name.
    for file in source_files(path, text_format, split):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def source_files(path: Path, text_format: TextFormat | None, split: str) -> list[Path]:
    """Return the files that a path's rows are in, those of a saved dataset too.

    Raises:
        UserError: the file type is unknown, or the folder has no data file of the split.
    """
    if is_saved_dataset(path):
        return saved_dataset_files(path, split)
    return data_files(path, text_format, split=split)


def is_saved_dataset(path: Path) -> bool:
    """Return True for a folder that `save_to_disk` wrote: a dataset, or one for each split."""
    # Not dataset_info.json, which folders of plain data files may have too.
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def saved_dataset_files(path: Path, split: str) -> list[Path]:
    """Return the Arrow files of a saved dataset.

    Raises:
        UserError: it has splits, but not this one.
    """
    if (path / "state.json").is_file():
        return sorted(path.glob("*.arrow"))
    if not (path / split / "state.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        repair = f"data.split={splits[0]}" if splits else ""
        raise UserError(Problem(str(path), f"no split '{split}'", f"one of {', '.join(splits)}", repair))
    return sorted((path / split).glob("*.arrow"))


def _digest_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_text(path: Path, note: Note = ignore) -> io.TextIOWrapper:
    """Open a text file, compressed or not, in its encoding: UTF-8, UTF-16 or cp949.

    Raises:
        OSError: it cannot be opened.
    """
    with _open_bytes(path) as stream:
        encoding = _detect_encoding(stream.read(SNIFFED_BYTES))
    if encoding != UTF8:
        note(f"{path.name}: read as {encoding}")
    # newline="" as csv demands.
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline="")


def _open_bytes(path: Path) -> BinaryIO:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    if name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _detect_encoding(start: bytes) -> str:
    """Return the encoding of a text by its first bytes."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if _decodes(start, "utf-8"):
        return UTF8
    # Other encodings of one byte per letter decode as cp949 now and then, but not to Hangul alone.
    text = start.decode("cp949", errors="replace")
    letters = [letter for letter in text if ord(letter) > 127]
    hangul = sum("\uac00" <= letter <= "\ud7a3" for letter in letters)
    return "cp949" if _decodes(start, "cp949") and hangul > MIN_HANGUL * len(letters) else UTF8


def _decodes(start: bytes, encoding: str) -> bool:
    try:
        # Not final: the last character may be cut.
        codecs.getincrementaldecoder(encoding)().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def check_not_lfs_pointer(path: Path) -> None:
    """Raise UserError if a file is only the pointer that Git LFS puts in its place."""
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            actual = "a pointer of Git LFS, not the data"
            raise UserError(
                Problem(str(path), actual, "the file itself", "run `git lfs pull` in its repository")
            )


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]
