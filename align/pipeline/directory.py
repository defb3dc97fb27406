"""A pipeline's own folder: which stages are finished, and where their runs are; every file in one move."""

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
        """Look at a pipeline's folder; nothing is written.

        Raises:
            UserError: the folder holds something else.
        """
        self.path = pipeline.path
        self.made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.record = self._read()
        if self.record and self.record.get("digest") != pipeline.digest:
            found = f"pipeline {self.record.get('pipeline')} with other settings or other data"
            expected = f"a folder of this one ({pipeline.digest})"
            raise UserError(Problem(f"--out {self.path}", found, expected, "choose another --out"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep every other process out of it.

        Raises:
            UserError: another process is at work in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            found = "another process is running this pipeline"
            raise UserError(
                Problem(str(self.path), found, "one process at a time", "wait for its end")
            ) from error
        except OSError as error:
            found = f"cannot be written: {error.strerror}"
            raise UserError(
                Problem(str(self.path), found, "a folder that can be written", "use --out")
            ) from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, pipeline: Pipeline, command: str) -> None:
        """Write what runs; of an earlier start, the stages stay on record."""
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
        """Lay fields over pipeline.json."""
        self.record |= fields
        self._save()

    def stage(self, name: str, **fields: Any) -> None:
        """Write what is known of a stage, in place of what was."""
        self.record["stages"][name] = fields
        self._save()

    def write(self, name: str, text: str) -> None:
        """Write a text file in one move."""
        partial = self.path / PARTIAL.format(name)
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    def samples(self) -> list[dict[str, Any]]:
        """Return the lines of samples.jsonl, none where there is no such file."""
        path = self.path / SAMPLES
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def withdraw(self) -> None:
        """Take the folder away again if this start has made it."""
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
            repair = "delete that file; the stages' own runs stay as they are"
            raise UserError(
                Problem(str(file), "damaged", "the JSON that a pipeline writes", repair)
            ) from error
        return record

    def _refuse_foreign(self) -> None:
        """Raise UserError if something else than a pipeline's folder lies there."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(Problem(f"--out {self.path}", "a file", "a folder, or a name that is free"))
        own = {LOCK, RESOLVED, PARTIAL.format(RECORD), PARTIAL.format(RESOLVED)}
        if self.path.is_dir() and any(file.name not in own for file in self.path.iterdir()):
            found = "a folder with other files, no pipeline's"
            repair = "choose another --out; nothing in that folder was touched"
            raise UserError(Problem(f"--out {self.path}", found, "an empty folder, or a new name", repair))


def now() -> str:
    """Return the time of day, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
