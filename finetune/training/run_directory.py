"""Run directory: its files, whether it may be used, the lock, and atomic writes."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune.planning.world import world
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import RUNS, read_record
from finetune.training.run_fingerprint import run_fingerprint

REPLACED = "replaced"
SAMPLES = "samples.jsonl"
CHOSEN = "chosen.jsonl"
METRICS = "metrics.jsonl"
OWN_FILES = ("recipe.yaml", METRICS, SAMPLES, CHOSEN, "report.html", "run.json")
MERGED, RULES = "merged", "rules"
DRAWN, ROUNDS = "drawn", "rounds"
OWN_FOLDERS = ("adapter", "model", MERGED, RULES, DRAWN, ROUNDS, "checkpoints")
LOCK = ".lock"
PARTIAL = ".{}.partial"


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
        self.record = read_record(path)
        self.writes = world().main

    @classmethod
    def of(cls, recipe: Recipe, *, force: bool) -> "RunDirectory":
        """Return the directory of a recipe's run if it may be used; nothing is written.

        Args:
            recipe: the recipe of the run.
            force: an earlier run in the folder is replaced when the new one starts.

        Raises:
            UserError: data or a parent run are missing, or the folder holds something else.
        """
        return cls.open(recipe, run_fingerprint(recipe.settings), force=force)

    @classmethod
    def open(cls, recipe: Recipe, fingerprint: str, *, force: bool) -> "RunDirectory":
        """Return a run's directory as ``of`` does, with a fingerprint that is known already.

        Args:
            recipe: the recipe of the run.
            fingerprint: digest of the run's inputs besides its settings: other data, other run.
            force: an earlier run in the folder is replaced when the new one starts.

        Raises:
            UserError: the folder holds something else.
        """
        digest = recipe.digest(fingerprint)
        path = recipe.out or RUNS / f"{recipe.stage}-{recipe.name}-{digest}"
        run = cls(path, recipe, digest, fingerprint=fingerprint)
        if force and run.record:
            run.record["status"] = REPLACED
        else:
            run.check()
        return run

    @property
    def replaced(self) -> bool:
        """Return whether an earlier run's files must be deleted first."""
        return self.record.get("status") == REPLACED

    @property
    def finished(self) -> bool:
        """Return whether the folder holds a finished run of the same recipe."""
        return self.record.get("status") == "finished"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def check(self) -> None:
        """Raise UserError if the folder holds anything but a run of this recipe."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(Problem(f"--out {self.path}", "a file", "a folder, or an unused name"))
        if not self.record and self.path.is_dir() and self._foreign_files():
            expected = "an empty folder, a new name, or the folder of an earlier run"
            repair = "choose another --out; nothing in that folder was changed"
            raise UserError(
                Problem(f"--out {self.path}", "a folder with other files, not a run", expected, repair)
            )
        if self.record and self.record["digest"] != self.digest:
            found = f"a run with other settings or data ({self.record['recipe']}, {self.record['digest']})"
            repair = "choose another --out, or --force to replace that run"
            raise UserError(
                Problem(f"--out {self.path}", found, f"a run of this recipe ({self.digest})", repair)
            )

    def clear(self) -> None:
        """Delete an earlier run's files, run.json last: a kill midway leaves no run that looks finished."""
        if not self.record or not self.writes:
            self.record = {}
            return
        # Marked on disk first: after a kill during the deletion the next run clears the rest.
        self.update(status=REPLACED)
        for name in OWN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in OWN_FILES:
            (self.path / name).unlink(missing_ok=True)
        self.record = {}

    @contextmanager
    def start(self) -> Iterator[None]:
        """Create the folder and hold its lock inside the block.

        Raises:
            UserError: another process holds the lock, or the folder is not writable.
        """
        if not self.writes:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            found = "another process uses this folder"
            raise UserError(
                Problem(str(self.path), found, "one process at a time", "wait, or use --out")
            ) from error
        except OSError as error:
            found = f"not writable: {error.strerror}"
            raise UserError(Problem(str(self.path), found, "a writable folder", "use --out")) from error
        try:
            yield
        finally:
            lock.release()

    def update(self, **fields: Any) -> None:
        """Update fields of run.json; sections (dicts) are merged."""
        for key, value in fields.items():
            old = self.record.get(key)
            self.record[key] = (
                {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
            )
        self.write("run.json", json.dumps(self.record, indent=1, ensure_ascii=False, default=str) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        if not self.writes:
            return
        # A rename is atomic: neither a kill nor a concurrent reader sees an incomplete file.
        partial = self.path / PARTIAL.format(name)
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append an entry to metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        return self.lines(METRICS)

    def samples(self) -> list[dict[str, Any]]:
        return self.lines(SAMPLES)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the entries of a JSON Lines file; empty if there is no such file."""
        path = self.path / name
        # The last element is empty, or an entry that a kill truncated.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def write_lines(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSON Lines file atomically."""
        self.write(name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def forget_after(self, step: int) -> None:
        """Drop metrics of later steps, which a resumed run logs again."""
        if not self.writes:
            return
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.write_lines(METRICS, kept)

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Yield a temporary folder that atomically becomes ``name`` on success."""
        assert self.writes, "only rank 0 saves"
        with replacing(self.path, name) as partial:
            yield partial

    def _foreign_files(self) -> bool:
        """Return whether the folder holds files that a run killed at its start would not leave."""
        # A run killed at its start leaves the lock and a partial run.json.
        return any(
            file.name != LOCK and file.name != PARTIAL.format("run.json") for file in self.path.iterdir()
        )


@contextmanager
def replacing(path: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder that atomically becomes ``path/name`` on success."""
    partial = path / PARTIAL.format(name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    shutil.rmtree(path / name, ignore_errors=True)
    os.replace(partial, path / name)
