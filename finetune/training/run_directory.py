"""A run's folder: what is in it, whether it may be used, and how each file gets there whole or not at all."""

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

    Where several processes share a run, each has the record, and the one of rank 0 writes.
    """

    def __init__(self, path: Path, recipe: Recipe, digest: str, *, fingerprint: str = "") -> None:
        """Look at a folder; nothing is written before ``start``."""
        self.path = path
        self.recipe = recipe
        self.digest = digest
        self.fingerprint = fingerprint
        self.record = read_record(path)
        self.writes = world().main

    @classmethod
    def of(cls, recipe: Recipe, *, force: bool) -> "RunDirectory":
        """Find the folder of a recipe's run and see whether it may be used; nothing is written.

        Args:
            recipe: what will run.
            force: an earlier run in the folder is replaced when the new one starts.

        Raises:
            UserError: data or a start that are not there, or the folder holds something else.
        """
        return cls.open(recipe, run_fingerprint(recipe.settings), force=force)

    @classmethod
    def open(cls, recipe: Recipe, fingerprint: str, *, force: bool) -> "RunDirectory":
        """Find a run's folder as ``of`` does, where what it is made of is known.

        Args:
            recipe: what will run.
            fingerprint: digest of what it is made of beside its settings; other data, other run.
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
        """Tell whether an earlier run's files are to be deleted first."""
        return self.record.get("status") == REPLACED

    @property
    def finished(self) -> bool:
        """Tell whether an earlier run of the same recipe came to its end here."""
        return self.record.get("status") == "finished"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    def check(self) -> None:
        """Raise UserError if the folder holds something else than this recipe's run."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(Problem(f"--out {self.path}", "a file", "a folder, or a name that is free"))
        if not self.record and self.path.is_dir() and self._foreign_files():
            expected = "an empty folder, a new name, or a folder of an earlier run"
            repair = "choose another --out; nothing in that folder was touched"
            raise UserError(
                Problem(f"--out {self.path}", "a folder with other files, no run", expected, repair)
            )
        if self.record and self.record["digest"] != self.digest:
            found = (
                f"a run of other settings or other data ({self.record['recipe']}, {self.record['digest']})"
            )
            repair = "choose another --out, or --force to put the new run in its place"
            raise UserError(
                Problem(f"--out {self.path}", found, f"a run of this recipe ({self.digest})", repair)
            )

    def clear(self) -> None:
        """Delete an earlier run's files, run.json last: a kill midway leaves no run that looks whole."""
        if not self.record or not self.writes:
            self.record = {}
            return
        self.update(status=REPLACED)
        for name in OWN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in OWN_FILES:
            (self.path / name).unlink(missing_ok=True)
        self.record = {}

    @contextmanager
    def start(self) -> Iterator[None]:
        """Make the folder and keep every other run out of it while this one lasts.

        Raises:
            UserError: another run is at work in it, or it cannot be written.
        """
        if not self.writes:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            found = "another process is running in this folder"
            raise UserError(
                Problem(str(self.path), found, "one process at a time", "wait, or use --out")
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

    def update(self, **fields: Any) -> None:
        """Lay fields over run.json; sections (dicts) are merged."""
        for key, value in fields.items():
            old = self.record.get(key)
            self.record[key] = (
                {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
            )
        self.write("run.json", json.dumps(self.record, indent=1, ensure_ascii=False, default=str) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a text file in one move."""
        if not self.writes:
            return
        partial = self.path / PARTIAL.format(name)
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return self.lines(METRICS)

    def samples(self) -> list[dict[str, Any]]:
        """Return the lines of samples.jsonl."""
        return self.lines(SAMPLES)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return a file's lines, none where there is no such file; one cut short by a kill is left out."""
        path = self.path / name
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def write_lines(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write a file of one object a line in one move."""
        self.write(name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def forget_after(self, step: int) -> None:
        """Drop metrics of later steps, which a resumed run takes again."""
        if not self.writes:
            return
        kept = [line for line in self.metrics() if line["step"] <= step]
        self.write_lines(METRICS, kept)

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Give a folder to write to, which takes the name ``name`` in one move when all went well."""
        assert self.writes, "rank 0 alone saves"
        with replacing(self.path, name) as partial:
            yield partial

    def _foreign_files(self) -> bool:
        """Tell whether something lies here beside what a run leaves that was killed before its first line."""
        return any(
            file.name != LOCK and file.name != PARTIAL.format("run.json") for file in self.path.iterdir()
        )


@contextmanager
def replacing(path: Path, name: str) -> Iterator[Path]:
    """Give a folder to write to, which takes the name ``path/name`` in one move when all went well."""
    partial = path / PARTIAL.format(name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    shutil.rmtree(path / name, ignore_errors=True)
    os.replace(partial, path / name)
