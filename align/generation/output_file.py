"""The output of ``generate``: rows with their results, as JSON Lines or CSV, resumable after a kill.

Results are appended to ``.NAME.partial`` while they are computed: first a line with what they depend on, then
a line per row. The output itself appears when it is complete, with ``NAME.json``: the same facts and metrics.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from finetune.recipe.disk import OUTPUT_REPAIR, writing
from finetune.recipe.errors import Problem, UserError

SUFFIXES = {".jsonl": None, ".ndjson": None, ".csv": ",", ".tsv": "\t"}
"""Suffix of the output -> separator of its fields; None: JSON Lines."""
LOCK_TIMEOUT = 0.5
Row = Mapping[str, Any]
Facts = Mapping[str, Any]


class OutputFile:
    """An output and what it depends on (model, data, settings)."""

    def __init__(self, path: Path, facts: Facts) -> None:
        """Check the name; nothing is written.

        Args:
            path: the output.
            facts: what the results depend on, as JSON values.

        Raises:
            UserError: unknown suffix, or no such folder.
        """
        self.path, self.facts = path, facts
        self.info_path = path.with_name(f"{path.name}.json")
        self.partial = path.with_name(f".{path.name}.partial")
        if path.suffix.lower() not in SUFFIXES:
            expected = f"a name that ends in {', '.join(SUFFIXES)}"
            raise UserError(Problem(f"--out {path}", "unknown file type", expected))
        if not path.absolute().parent.is_dir():
            actual = f"no such folder: {path.absolute().parent}"
            raise UserError(Problem(f"--out {path}", actual, "an existing folder"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output's lock inside the block; raises UserError if another process has it."""
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=LOCK_TIMEOUT)
        try:
            lock.acquire()
        except Timeout as error:
            actual = "another process writes it"
            raise UserError(Problem(f"--out {self.path}", actual, "an output of its own")) from error
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def finished(self) -> dict[str, Any] | None:
        """Return the record of a finished output of the same facts; None if there is no output.

        Raises:
            UserError: the file is another one.
        """
        if not self.path.exists():
            return None
        record = _read_json(self.info_path)
        if record is None:
            self._refuse("a file that `generate` did not write")
        self._check_facts(record["facts"])
        return record

    def results(self) -> list[dict[str, Any]]:
        """Return the results so far, after a kill too, and cut what it left of a line.

        Raises:
            UserError: they are of another model, other data or other settings.
        """
        content = self.partial.read_bytes() if self.partial.is_file() else b""
        complete = content[: content.rfind(b"\n") + 1]
        facts, *results = map(json.loads, complete.splitlines() or [b"{}"])
        # Without a result there is nothing to lose: the earlier command failed before its first rows.
        if not results:
            self._append([self.facts], mode="wb")
            return []
        self._check_facts(facts)
        if len(complete) < len(content):
            os.truncate(self.partial, len(complete))
        return results

    def append(self, results: Sequence[Row]) -> None:
        """Append results in one write; raises StorageError."""
        self._append(results, mode="ab")

    def finish(self, rows: Sequence[Row], record: Facts) -> None:
        """Write the output and its record, and delete the partial results; raises StorageError."""
        separator = SUFFIXES[self.path.suffix.lower()]
        text = "".join(map(_json_line, rows)) if separator is None else _csv_text(rows, separator)
        # The record first: an output without one would be refused.
        self._write(self.info_path, json.dumps({**record, "facts": self.facts}, ensure_ascii=False, indent=1))
        self._write(self.path, text)
        self.partial.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the output and what belongs to it."""
        for path in (self.path, self.info_path, self.partial):
            path.unlink(missing_ok=True)

    def _append(self, lines: Sequence[Row], *, mode: str) -> None:
        content = "".join(map(_json_line, lines)).encode()
        with (
            writing(self.partial, needed=len(content), repair=OUTPUT_REPAIR),
            self.partial.open(mode) as stream,
        ):
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    def _write(self, path: Path, text: str) -> None:
        content = text.encode()
        temporary = path.with_name(f".{path.name}.new")
        with writing(path, needed=len(content), repair=OUTPUT_REPAIR):
            temporary.write_bytes(content)
            temporary.replace(path)

    def _check_facts(self, facts: Facts) -> None:
        changed = [name for name in {**self.facts, **facts} if self.facts.get(name) != facts.get(name)]
        if changed:
            pairs = (
                f"{name} {_short(facts.get(name))} there, {_short(self.facts.get(name))} now"
                for name in changed
            )
            self._refuse(f"results of another command: {'; '.join(pairs)}")

    def _refuse(self, actual: str) -> NoReturn:
        repair = "another --out, or --force to replace it"
        raise UserError(Problem(f"--out {self.path}", actual, "a new file, or one of this command", repair))


def _json_line(row: Row) -> str:
    # default=str: columns of a dataset may hold what JSON cannot, such as dates.
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _csv_text(rows: Sequence[Row], separator: str) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> str:
    """Return a value as the text of a field; lists and objects are JSON, as in the files that we read."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return a record that ``finish`` wrote; None if there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and "facts" in record else None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
