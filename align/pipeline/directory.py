"""Pipeline folder: pipeline.json, samples and report, written atomically under a file lock; its result."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.pipeline.plan import Pipeline
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import LOCK_FILE, ROWS_FOLDER, with_live_status
from finetune.training.atomic_files import (
    PARTIAL_NAME,
    locked_folder,
    read_jsonl,
    write_text_atomically,
)
from finetune.training.result import Result

RECORD_FILE, RESOLVED_FILE = "pipeline.json", "pipeline.yaml"
REPORT_FILE, SAMPLES_FILE = "report.html", "samples.jsonl"


@dataclass(frozen=True)
class PipelineResult:
    """The result of a pipeline.

    Attributes:
        directory: the pipeline's directory.
        record: content of pipeline.json.
        stages: the result of each stage, by its name in the pipeline.
        samples: one entry per prompt: ``prompt``, ``expected``, ``replies`` (stage -> text) and ``rewards``
            (reward model stage -> stage -> number).
    """

    directory: Path
    record: dict[str, Any]
    stages: dict[str, Result]
    samples: list[dict[str, Any]]

    @property
    def last(self) -> Result:
        """Return the result of the last stage."""
        return list(self.stages.values())[-1]


class PipelineDirectory:
    """``runs/<pipeline>-<hash8>``, or the folder that ``--out`` names."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Read a pipeline's folder, if it exists; nothing is written.

        Raises:
            UserError: the folder belongs to something else.
        """
        self.path = pipeline.path
        # Listed before anything is created: `remove_if_new` removes these folders only.
        self.new_folders = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.record = self._read_record()
        if self.record and self.record.get("digest") != pipeline.digest:
            actual = f"pipeline {self.record.get('pipeline')} with different settings or data"
            expected = f"a folder of this pipeline ({pipeline.digest})"
            raise UserError(Problem(f"--out {self.path}", actual, expected, "choose another --out"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold its lock.

        Raises:
            UserError: another process holds the lock, or the folder cannot be written.
        """
        where = str(self.path)
        in_use = Problem(
            where,
            "another process is running this pipeline",
            "one process at a time",
            "wait for it to finish",
        )
        unwritable = Problem(where, "cannot be written", "a writable folder", "choose another one with --out")
        with locked_folder(self.path, in_use=in_use, unwritable=unwritable):
            yield

    def write_initial_record(self, pipeline: Pipeline, command: str) -> None:
        """Write the initial record; stages recorded by an earlier start are preserved."""
        started = self.record.get("started") or utc_now()
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
        entries = [entry.with_stored_rows(self.path) for entry in pipeline.entries]
        self.write(RESOLVED_FILE, replace(pipeline, entries=entries).to_yaml())
        self._save()

    def update(self, **fields: Any) -> None:
        """Update fields of pipeline.json."""
        self.record |= fields
        self._save()

    def record_stage(self, name: str, **fields: Any) -> None:
        """Replace the record of a stage."""
        self.record["stages"][name] = fields
        self._save()

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_text_atomically(self.path / name, text)

    def samples(self) -> list[dict[str, Any]]:
        """Return the entries of samples.jsonl; empty if the file does not exist."""
        return read_jsonl(self.path / SAMPLES_FILE)

    def remove_if_new(self) -> None:
        """Remove the folder if this process created it."""
        if self.path not in self.new_folders:
            return
        for name in (RECORD_FILE, RESOLVED_FILE, LOCK_FILE):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / ROWS_FOLDER, ignore_errors=True)
        for folder in self.new_folders:
            if not any(folder.iterdir()):
                folder.rmdir()

    def _save(self) -> None:
        self.write(RECORD_FILE, json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")

    def _read_record(self) -> dict[str, Any]:
        file = self.path / RECORD_FILE
        if not file.exists():
            self._check_no_foreign_files()
            return {}
        try:
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(_damaged_record(file, "not valid JSON")) from error
        except OSError as error:
            raise UserError(_damaged_record(file, f"cannot be read: {error.strerror}")) from error
        stages = record.get("stages", {}) if isinstance(record, dict) else None
        if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
            raise UserError(_damaged_record(file, "not written by llm-align"))
        return with_live_status(self.path, record)

    def _check_no_foreign_files(self) -> None:
        """Raise UserError if the path holds anything but a pipeline's folder."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(
                Problem(f"--out {self.path}", "a file", "a folder, or a path that does not exist")
            )
        # A process that was killed at its start leaves these.
        known_files = {
            LOCK_FILE,
            ROWS_FOLDER,
            RESOLVED_FILE,
            PARTIAL_NAME.format(RECORD_FILE),
            PARTIAL_NAME.format(RESOLVED_FILE),
        }
        if self.path.is_dir() and any(file.name not in known_files for file in self.path.iterdir()):
            actual = "a folder with files that are not a pipeline's"
            repair = "choose another --out; nothing in this folder was changed"
            raise UserError(Problem(f"--out {self.path}", actual, "an empty or new folder", repair))


def _damaged_record(file: Path, actual: str) -> Problem:
    repair = "delete it; the runs of the stages are not affected"
    return Problem(str(file), actual, "the record of a pipeline", repair)


def utc_now() -> str:
    """Return the current UTC time in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
