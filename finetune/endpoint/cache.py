"""Answers of endpoints, cached on disk by the content of their requests: a repeated request costs nothing.

One SQLite file. Answers are committed as they arrive; several processes may use the file at the same time.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from finetune.recipe.disk import storage_error
from finetune.recipe.errors import Problem, UserError

FILE = "endpoint-answers.sqlite"
FORMAT = 1
"""Part of every key: raised when stored answers change."""
BUSY_SECONDS = 60
"""How long a process waits for the write of another one."""
KEYS_PER_QUERY = 500
"""SQLite limits the number of a query's parameters."""
# The default rollback journal, and not WAL: that needs shared memory, which network file systems lack.
SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"


def request_key(url: str, path: str, body: Mapping[str, Any], seed: int | None) -> str:
    """Return the key of a request: a digest of all that decides its answer.

    Args:
        url: base URL of the endpoint.
        path: of the API.
        body: the request, with model and sampling settings.
        seed: also where the request has no seed because the server takes none: samples stay different.
    """
    text = json.dumps([FORMAT, url, path, body, seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class EndpointCache:
    """The cached answers of all endpoints."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open or create the file.

        Args:
            folder: where it is; None: in the user's cache folder.

        Raises:
            UserError: the folder cannot be written, or the file is damaged.
        """
        folder = folder or user_cache_path("llm-align")
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise self._error(error) from error

    def load(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the cached answers among these keys."""
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
        repair = "delete the file (its answers are requested again), or set another `cache`"
        actual = f"the cache of endpoint answers cannot be used: {error}"
        return UserError(Problem(str(self.path), actual, "a file that can be read and written", repair))
