"""Answers of a model, cached on disk by content: a killed evaluation resumes, and no item is asked twice.

One SQLite file per model. Several processes may share it: SQLite locks it, and equal keys have equal answers.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from finetune.recipe.disk import storage_error
from finetune.recipe.errors import Problem, UserError

BUSY_SECONDS = 60
"""How long a process waits for another one's write."""
SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
MAX_VARIABLES = 500
"""Keys per query: SQLite limits the variables of a statement."""
Ask = Callable[[Sequence[int]], Sequence[Any]]
"""Answers the questions at these indices, as JSON values."""


def default_folder() -> Path:
    """Return the folder of caches in the user's cache."""
    return user_cache_path("llm-align") / "answers"


def digest(value: Any) -> str:
    """Return a digest of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """The cached answers of one model."""

    def __init__(self, identity: Mapping[str, Any], folder: Path | None = None) -> None:
        """Open or create the model's file.

        Args:
            identity: what decides the model's answers.
            folder: of the caches; None: in the user's cache.

        Raises:
            UserError: the folder cannot be written, or the file is damaged.
        """
        folder = folder or default_folder()
        self.path = folder / f"{digest(identity)[:32]}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                # Readers do not wait for writers, and a kill leaves a consistent file.
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise self._error(error) from error

    def answers(self, questions: Sequence[Any], ask: Ask, *, window: int) -> list[Any]:
        """Return the answer of each question, asking those that are not in the cache.

        Args:
            questions: JSON values that decide the answers, besides the model.
            ask: answers the questions at some indices.
            window: questions to ask at once; their answers are stored before the next ones are asked.
        """
        keys = [digest(question) for question in questions]
        known = self._load(keys)
        # Equal questions are asked once.
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in first.items() if key not in known)
        for start in range(0, len(missing), window):
            indices = missing[start : start + window]
            new = {keys[index]: answer for index, answer in zip(indices, ask(indices), strict=True)}
            self._store(new)
            known |= new
        return [known[key] for key in keys]

    def count_missing(self, questions: Sequence[Any]) -> int:
        """Return how many different questions are not in the cache."""
        keys = {digest(question) for question in questions}
        return len(keys) - len(self._load(list(keys)))

    def _load(self, keys: Sequence[str]) -> dict[str, Any]:
        known: dict[str, Any] = {}
        try:
            with closing(self._connect()) as connection:
                for start in range(0, len(keys), MAX_VARIABLES):
                    part = keys[start : start + MAX_VARIABLES]
                    marks = ",".join("?" * len(part))
                    query = f"SELECT key, answer FROM answers WHERE key IN ({marks})"
                    known |= {key: json.loads(answer) for key, answer in connection.execute(query, part)}
        except sqlite3.Error as error:
            raise self._error(error) from error
        return known

    def _store(self, answers: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(answer, ensure_ascii=False)) for key, answer in answers.items()]
        try:
            with closing(self._connect()) as connection, connection:
                connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=BUSY_SECONDS)

    def _error(self, error: Exception) -> UserError:
        if isinstance(error, OSError) and (storage := storage_error(error, self.path)):
            return storage
        actual = f"the cache of answers cannot be used: {error}"
        repair = "delete this file; its answers are computed again"
        return UserError(Problem(str(self.path), actual, "a file that can be written", repair))
