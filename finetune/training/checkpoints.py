"""Checkpoint checksums: written when a checkpoint is complete, verified before it is resumed from."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune.recipe.checkpoint_folder import CHECKSUM_FILE


@dataclass(frozen=True, slots=True)
class LastCheckpoint:
    """The newest valid checkpoint, if there is one, and the errors of newer corrupt ones."""

    path: Path | None
    corrupt: list[str]

    @property
    def step(self) -> int:
        """Return the optimizer step of the checkpoint, 0 without one."""
        return _step(self.path) if self.path else 0


NO_CHECKPOINT = LastCheckpoint(None, [])


def write_checksums(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files; a checkpoint without this file is ignored."""
    # fsync first, then an atomic rename: the checksum file exists only if all files are on disk. A run that
    # is killed before that resumes from the previous checkpoint.
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    checksums = {str(file.relative_to(checkpoint)): _sha256(file) for file in files}
    partial = checkpoint / f"{CHECKSUM_FILE}.partial"
    partial.write_text(json.dumps(checksums, indent=1), encoding="utf-8")
    partial.replace(checkpoint / CHECKSUM_FILE)


def find_last_valid(folder: Path) -> LastCheckpoint:
    """Return the newest checkpoint whose files match its checksums, and the corrupt ones after it."""
    corrupt: list[str] = []
    # By number: as names, checkpoint-80 sorts after checkpoint-100.
    for checkpoint in sorted(_checkpoint_folders(folder), key=_step, reverse=True):
        if not (checkpoint / CHECKSUM_FILE).is_file():
            continue
        problem = _corruption(checkpoint)
        if not problem:
            return LastCheckpoint(checkpoint, corrupt)
        corrupt.append(f"{checkpoint}: {problem}")
    return LastCheckpoint(None, corrupt)


def complete_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints that were written completely, without verifying their files."""
    return [
        _step(checkpoint)
        for checkpoint in _checkpoint_folders(folder)
        if (checkpoint / CHECKSUM_FILE).is_file()
    ]


def incomplete_bytes(folder: Path) -> int:
    """Return the bytes of checkpoints that were not written completely, which a resumed run deletes."""
    unfinished = [path for path in _checkpoint_folders(folder) if not (path / CHECKSUM_FILE).is_file()]
    return sum(map(folder_bytes, unfinished))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files, 0 if there is no such folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove_newer_than(folder: Path, step: int) -> None:
    """Delete checkpoints of later steps: incomplete or corrupt ones, which a resumed run writes again."""
    for checkpoint in _checkpoint_folders(folder):
        if _step(checkpoint) > step:
            shutil.rmtree(checkpoint)


def _corruption(checkpoint: Path) -> str:
    try:
        checksums = json.loads((checkpoint / CHECKSUM_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"{CHECKSUM_FILE} is unreadable"
    if not isinstance(checksums, dict):
        return f"{CHECKSUM_FILE} is unreadable"
    for name, expected in checksums.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != expected:
            return f"{name}: checksum mismatch"
    return ""


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders named ``checkpoint-<step>``; a user's copies have other names."""
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
