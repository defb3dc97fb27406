"""Run directory: its files, whether it may be used, the lock, atomic writes; its result."""

import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.distributed.rank import dist_info
from finetune.recipe.checkpoint_folder import MERGED
from finetune.recipe.disk import StorageError, writing
from finetune.recipe.errors import LibraryError, Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import (
    FINISHED,
    FORMAT,
    LOCK_FILE,
    RUNNING,
    STOPPED,
    read_run_record,
    refuse_outdated,
)
from finetune.training.atomic_files import (
    PARTIAL_NAME,
    atomic_folder,
    locked_folder,
    read_jsonl,
    write_text_atomically,
)
from finetune.training.checkpoints import complete_steps, remove_newer_than
from finetune.training.fingerprint import CodeChange, find_code_change, run_fingerprint
from finetune.training.longer_run import LongerRun, find_longer_run
from finetune.training.matching_run import (
    ACCEPT_REPAIR,
    REPLACED,
    changed_code_problem,
    default_path,
    describe_differences,
    interrupted_with_other_code,
    own_longer_run,
    shorter_run_note,
)

SAMPLES = "samples.jsonl"
SELECTED = "chosen.jsonl"
ROLLOUTS, HELD_OUT = "rollouts.jsonl", "held_out.jsonl"
"""Sampled completions of training with their rewards; graded completions of held-out prompts."""
METRICS = "metrics.jsonl"
RUN_FILES = ("recipe.yaml", METRICS, SAMPLES, SELECTED, ROLLOUTS, HELD_OUT, "report.html", "run.json")
RULES = "rules"
CANDIDATES, ROUNDS = "drawn", "rounds"
EVALUATION = "evaluation"
"""Folder of the results of ``llm-align eval``."""
RUN_FOLDERS = ("adapter", "model", MERGED, RULES, CANDIDATES, ROUNDS, EVALUATION, "checkpoints")


class RunDirectory:
    """``runs/<stage>-<recipe>-<hash8>``, or the folder that ``--out`` names.

    Every rank has the record; only rank 0 writes.
    """

    def __init__(self, path: Path, recipe: Recipe, digest: str, *, fingerprint: str = "") -> None:
        """Read a folder's record; nothing is written before the lock is taken."""
        self.path = path
        self.recipe = recipe
        self.digest = digest
        self.fingerprint = fingerprint
        self.code_change: CodeChange | None = None
        self.longer: LongerRun | None = None
        self.note = ""
        self.record = read_run_record(path)
        self.is_writer = dist_info().is_main
        self.is_held = False

    @classmethod
    def of(cls, recipe: Recipe, *, force: bool, accept_changed_code: bool = False) -> "RunDirectory":
        """Return the directory of a recipe's run if it may be used; nothing is written.

        Args:
            recipe: the recipe of the run.
            force: an earlier run in the folder is replaced when the new one starts.
            accept_changed_code: resume an interrupted run although files of its user functions have changed.

        Raises:
            UserError: data or a parent run are missing, or the folder holds something else.
        """
        fingerprint = run_fingerprint(recipe.settings)
        return cls.open(recipe, fingerprint, force=force, accept_changed_code=accept_changed_code)

    @classmethod
    def open(
        cls, recipe: Recipe, fingerprint: str, *, force: bool, accept_changed_code: bool = False
    ) -> "RunDirectory":
        """Return a run's directory as ``of`` does, with a fingerprint that is known already.

        Args:
            recipe: the recipe of the run.
            fingerprint: digest of the run's inputs besides its settings: other data, other run.
            force: an earlier run in the folder is replaced when the new one starts.
            accept_changed_code: resume an interrupted run although files of its user functions have changed.

        Raises:
            UserError: the folder holds something else.
        """
        digest = recipe.digest(fingerprint)
        path = recipe.out or default_path(recipe, digest)
        note = ""
        # A new run: the same run may have been interrupted with other code, and has another name.
        if recipe.out is None and not force and not read_run_record(path):
            earlier = interrupted_with_other_code(recipe, digest)
            longer = own_longer_run(recipe, fingerprint)
            if longer is not None:
                path = longer.path
            elif earlier is not None and accept_changed_code:
                path = earlier[0]
            elif earlier is not None:
                note = f"{earlier[0]} was interrupted with another version of {earlier[1]}: {ACCEPT_REPAIR}"
            else:
                note = shorter_run_note(recipe, fingerprint)
        run = cls(path, recipe, digest, fingerprint=fingerprint)
        run.note = note
        # Only marked: nothing is deleted before the new run has passed its pre-flight.
        if force and run.record:
            run.record["status"] = REPLACED
        else:
            run.check_usable(accept_changed_code=accept_changed_code)
        return run

    @property
    def replaced(self) -> bool:
        """Return whether an earlier run's files must be deleted first."""
        return self.record.get("status") == REPLACED

    @property
    def finished(self) -> bool:
        """Return whether the folder holds a finished run of the same recipe, which is not trained longer."""
        return self.record.get("status") == FINISHED and self.longer is None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def first_fingerprint(self) -> str:
        """Return the fingerprint at the start of the run, before code changes that the user accepted."""
        changes = self.record.get("code_changes")
        return str(changes[0]["fingerprint_before"]) if changes else self.fingerprint

    def check_usable(self, *, accept_changed_code: bool = False) -> None:
        """Raise UserError if the folder holds anything but a run of this recipe.

        Args:
            accept_changed_code: a run that was interrupted with other code of its user functions is usable.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(Problem(f"--out {self.path}", "a file", "a folder, or an unused name"))
        if not self.record and self.path.is_dir() and self._has_foreign_files():
            expected = "an empty folder, a new name, or the folder of an earlier run"
            repair = "choose another --out; nothing in that folder was changed"
            raise UserError(
                Problem(f"--out {self.path}", "a folder with other files, not a run", expected, repair)
            )
        refuse_outdated(f"--out {self.path}", self.record)
        if self._stopped_before_start:
            # A library stopped it before its first step: there is only the record of that to replace.
            self.record["status"] = REPLACED
        elif self.record and self.record["digest"] != self.digest:
            change = find_code_change(self.recipe, self.record)
            if change is not None and not self.finished:
                if not accept_changed_code:
                    raise UserError(changed_code_problem(self.path, change))
                self.code_change = change
                return
            longer = find_longer_run(self.path, self.recipe, self.record, self.fingerprint)
            if longer is not None:
                if problem := longer.early_problem():
                    raise UserError(problem)
                self.longer = longer
                return
            raise UserError(self._other_run_problem())

    def _other_run_problem(self) -> Problem:
        """Return the problem of a folder with the run of another recipe, or with other data."""
        actual = f"a run with other settings or data ({self.record['recipe']}, {self.record['digest']})"
        if differences := describe_differences(self.path, self.recipe):
            actual += f": {differences}"
        repair = "choose another --out, or --force to replace that run"
        if self.finished:
            repair += (
                f"; to continue from its weights: --from {shlex.quote(str(self.path))} with another --out"
            )
        return Problem(f"--out {self.path}", actual, f"a run of this recipe ({self.digest})", repair)

    def clear(self) -> None:
        """Delete an earlier run's files, run.json last: a kill midway leaves no run that looks finished."""
        if not self.record or not self.is_writer:
            self.record = {}
            return
        # Marked on disk first: after a kill during the deletion the next run clears the rest.
        self.update(status=REPLACED)
        for name in RUN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)
        self.record = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold its lock inside the block.

        Raises:
            UserError: another process holds the lock, or the folder is not writable.
        """
        if not self.is_writer:
            yield
            return
        where = str(self.path)
        in_use = Problem(
            where, "another process uses this folder", "one process at a time", "wait, or use --out"
        )
        unwritable = Problem(where, "not writable", "a writable folder", "use --out")
        with locked_folder(self.path, in_use=in_use, unwritable=unwritable):
            self.is_held = True
            yield
        self.is_held = False

    def update(self, **fields: Any) -> None:
        """Update fields of run.json; sections (dicts) are merged."""
        for key, value in fields.items():
            previous = self.record.get(key)
            self.record[key] = (
                {**previous, **value} if isinstance(previous, dict) and isinstance(value, dict) else value
            )
        self.write("run.json", json.dumps(self.record, indent=1, ensure_ascii=False, default=str) + "\n")

    def record_library_error(self, error: LibraryError, *, command: str) -> None:
        """Write the failure and its cause to run.json, also of a run that has not started yet."""
        # An earlier run that --force would replace keeps its record.
        if not self.is_writer or (self.replaced and not self._stopped_before_start):
            return
        recipe = {"stage": self.recipe.stage, "recipe": self.recipe.name, "command": command}
        # Without the lock nothing may be written; the error itself is still reported.
        with suppress(UserError), self.locked():
            self.update(format=FORMAT, status="failed", digest=self.digest, **recipe)
            self.update(error=str(error), cause=error.cause)

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        if self.is_writer:
            write_text_atomically(self.path / name, text)

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append an entry to metrics.jsonl."""
        self.append_jsonl(METRICS, [metrics])

    def append_jsonl(self, name: str, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append entries to a JSON Lines file, at once."""
        if not self.is_writer:
            return
        self.check_present()
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        with writing(self.path / name), (self.path / name).open("a", encoding="utf-8") as stream:
            stream.write(lines)

    def check_present(self) -> None:
        """Raise StorageError if the folder was deleted: an engine would create it again, without the rest."""
        if self.is_held and not (self.path / LOCK_FILE).exists():
            repair = "run the same command again: it starts over"
            actual = "the folder was deleted while the run used it"
            raise StorageError(Problem(str(self.path), actual, "the folder of this run", repair))

    def record_stop(self, error: StorageError) -> None:
        """Record that the run has stopped, also where the disk has no room for a new run.json."""
        if not self.is_writer or not self.path.is_dir():
            return
        # On a read-only disk the record keeps saying "running"; readers see that nobody holds the lock.
        with suppress(OSError):
            # An unfinished checkpoint is of no use, and the next run deletes it anyway.
            remove_newer_than(self.checkpoints, max(complete_steps(self.checkpoints), default=0))
        try:
            self.update(status=STOPPED, error=str(error))
        except StorageError:
            self.record["status"] = STOPPED
            with suppress(OSError):
                overwrite_status(self.path / "run.json")

    def metrics(self) -> list[dict[str, Any]]:
        return self.read_jsonl(METRICS)

    def samples(self) -> list[dict[str, Any]]:
        return self.read_jsonl(SAMPLES)

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """Return the entries of a JSON Lines file; empty if there is no such file."""
        return read_jsonl(self.path / name)

    def write_jsonl(self, name: str, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSON Lines file atomically."""
        self.write(name, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))

    def truncate_after(self, step: int) -> None:
        """Drop metrics and rollouts of later steps, which a resumed run logs again."""
        if not self.is_writer:
            return
        for name in (METRICS, ROLLOUTS):
            entries = [entry for entry in self.read_jsonl(name) if entry["step"] <= step]
            if name == METRICS or entries or (self.path / name).is_file():
                self.write_jsonl(name, entries)

    def forget_results(self) -> None:
        """Drop metrics and evaluations of the trained model: training goes on and replaces its weights."""
        metrics = self.record.get("metrics", {})
        # Assigned: `update` merges sections.
        self.record["metrics"] = {key: value for key, value in metrics.items() if not key.endswith("_after")}
        if "classification" in self.record:
            self.record["classification"].pop("after", None)
        self.update()
        if self.is_writer:
            shutil.rmtree(self.path / EVALUATION, ignore_errors=True)

    @contextmanager
    def atomic_folder(self, name: str) -> Iterator[Path]:
        """Yield a temporary folder that atomically becomes ``name`` on success."""
        assert self.is_writer, "only rank 0 saves"
        with atomic_folder(self.path, name) as partial:
            yield partial

    @property
    def _stopped_before_start(self) -> bool:
        """Return whether the record only holds a library's error from before the first step."""
        return "cause" in self.record and "started" not in self.record

    def _has_foreign_files(self) -> bool:
        """Return whether the folder holds files that a run killed at its start would not leave."""
        # A run killed at its start leaves the lock and a partial run.json.
        return any(
            file.name != LOCK_FILE and file.name != PARTIAL_NAME.format("run.json")
            for file in self.path.iterdir()
        )


def overwrite_status(record_file: Path) -> None:
    """Replace the status ``running`` of a run.json by ``stopped`` in place.

    The two have equally many bytes, so that the file needs no room on the disk.
    """
    running, stopped = (f'\n "status": "{status}"'.encode() for status in (RUNNING, STOPPED))
    assert len(running) == len(stopped)
    position = record_file.read_bytes().find(running)
    if position < 0:
        return
    with record_file.open("r+b") as stream:
        stream.seek(position)
        stream.write(stopped)
