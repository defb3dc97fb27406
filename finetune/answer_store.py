"""Answers of models on disk, by keys: one SQLite file, which several processes may use at the same time."""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from finetune.recipe.disk import storage_error
from finetune.recipe.errors import Problem, UserError

BUSY_SECONDS = 60
"""How long a process waits for the write of another one."""
KEYS_PER_QUERY = 500
"""SQLite limits the number of a query's parameters."""
# The default rollback journal, and not WAL: that needs shared memory, which network file systems lack.
SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"


class AnswerStore:
    """Answers as JSON values, by the digest of all that decides them."""

    def __init__(self, path: Path, *, repair: str) -> None:
        """Open or create the file.

        Args:
            path: the file.
            repair: what to do if it cannot be used.

        Raises:
            UserError: the folder cannot be written, or the file is damaged.
        """
        self.path, self.repair = path, repair
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise self._error(error) from error

    def load(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the stored answers among these keys; raises UserError if the file cannot be read."""
        answers: dict[str, Any] = {}
        try:
            with closing(self._connect()) as connection:
                for start in range(0, len(keys), KEYS_PER_QUERY):
                    part = keys[start : start + KEYS_PER_QUERY]
                    query = f"SELECT key, answer FROM answers WHERE key IN ({','.join('?' * len(part))})"
                    answers |= {key: json.loads(answer) for key, answer in connection.execute(query, part)}
        except (sqlite3.Error, ValueError) as error:
            raise self._error(error) from error
        return answers

    def store(self, answers: Mapping[str, Any]) -> None:
        """Store answers by their keys; those of another process, which came first, are kept.

        Raises:
            UserError: the file cannot be written.
        """
        rows = [(key, json.dumps(answer)) for key, answer in answers.items()]
        try:
            with closing(self._connect()) as connection, connection:
                connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _connect(self) -> sqlite3.Connection:
        # One connection for each access: connections survive neither threads nor forks.
        return sqlite3.connect(self.path, timeout=BUSY_SECONDS)

    def _error(self, error: Exception) -> UserError:
        if isinstance(error, OSError) and (storage := storage_error(error, self.path)):
            return storage
        actual = f"the stored answers cannot be used: {error}"
        return UserError(Problem(str(self.path), actual, "a file that can be read and written", self.repair))
