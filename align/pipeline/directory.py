"""Pipeline folder: pipeline.json, samples and report, written atomically under a file lock."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from filelock import FileLock, Timeout

from align.pipeline.plan import Pipeline
from finetune.recipe.errors import Problem, UserError

RECORD, RESOLVED, LOCK = "pipeline.json", "pipeline.yaml", ".lock"
REPORT, SAMPLES = "report.html", "samples.jsonl"
PARTIAL = ".{}.partial"


class PipelineDirectory:
    """``runs/<pipeline>-<hash8>``, or the folder that ``--out`` names."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Read a pipeline's folder, if it exists; nothing is written.

        Raises:
            UserError: the folder belongs to something else.
        """
        self.path = pipeline.path
        self.made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.record = self._read()
        if self.record and self.record.get("digest") != pipeline.digest:
            found = f"pipeline {self.record.get('pipeline')} with different settings or data"
            expected = f"a folder of this pipeline ({pipeline.digest})"
            raise UserError(Problem(f"--out {self.path}", found, expected, "choose another --out"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold its lock.

        Raises:
            UserError: another process holds the lock, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            found = "another process is running this pipeline"
            raise UserError(
                Problem(str(self.path), found, "one process at a time", "wait for it to finish")
            ) from error
        except OSError as error:
            found = f"cannot be written: {error.strerror}"
            raise UserError(
                Problem(str(self.path), found, "a writable folder", "choose another one with --out")
            ) from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, pipeline: Pipeline, command: str) -> None:
        """Write the initial record; stages recorded by an earlier start are preserved."""
        started = self.record.get("started") or now()
        stages = self.record.get("stages", {})
        self.record |= {
            "status": "running",
            "pipeline": pipeline.name,
            "digest": pipeline.digest,
            "command": command,
            "started": started,
            "stages": {
                entry.name: stages.get(entry.name, {"status": "waiting"}) for entry in pipeline.entries
            },
        }
        self.write(RESOLVED, pipeline.to_yaml())
        self._save()

    def update(self, **fields: Any) -> None:
        """Update fields of pipeline.json."""
        self.record |= fields
        self._save()

    def stage(self, name: str, **fields: Any) -> None:
        """Replace the record of a stage."""
        self.record["stages"][name] = fields
        self._save()

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        # A rename is atomic: a killed process leaves the old file, never half of the new one.
        partial = self.path / PARTIAL.format(name)
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    def samples(self) -> list[dict[str, Any]]:
        """Return the entries of samples.jsonl; empty if the file does not exist."""
        path = self.path / SAMPLES
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def withdraw(self) -> None:
        """Remove the folder if this process created it."""
        if self.path not in self.made:
            return
        for name in (RECORD, RESOLVED, LOCK):
            (self.path / name).unlink(missing_ok=True)
        for folder in self.made:
            if not any(folder.iterdir()):
                folder.rmdir()

    def _save(self) -> None:
        self.write(RECORD, json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")

    def _read(self) -> dict[str, Any]:
        file = self.path / RECORD
        if not file.is_file():
            self._refuse_foreign()
            return {}
        try:
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            repair = "delete this file; the runs of the stages are not affected"
            raise UserError(
                Problem(str(file), "not valid JSON", "the record of a pipeline", repair)
            ) from error
        return record

    def _refuse_foreign(self) -> None:
        """Raise UserError if the path holds anything but a pipeline's folder."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(
                Problem(f"--out {self.path}", "a file", "a folder, or a path that does not exist")
            )
        own = {LOCK, RESOLVED, PARTIAL.format(RECORD), PARTIAL.format(RESOLVED)}
        if self.path.is_dir() and any(file.name not in own for file in self.path.iterdir()):
            found = "a folder with files that are not a pipeline's"
            repair = "choose another --out; nothing in this folder was changed"
            raise UserError(Problem(f"--out {self.path}", found, "an empty or new folder", repair))


def now() -> str:
    """Return the current UTC time in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
