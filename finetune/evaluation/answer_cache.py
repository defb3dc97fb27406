"""Answers of a model, cached on disk by content: a killed evaluation resumes, and no item is asked twice.

One file per model (``AnswerStore``). Several processes may share it: equal keys have equal answers.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from finetune.answer_store import AnswerStore

REPAIR = "delete this file; its answers are computed again"
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
        file = (folder or default_folder()) / f"{digest(identity)[:32]}.sqlite"
        self.store = AnswerStore(file, repair=REPAIR)

    def answers(self, questions: Sequence[Any], ask: Ask, *, window: int) -> list[Any]:
        """Return the answer of each question, asking those that are not in the cache.

        Args:
            questions: JSON values that decide the answers, besides the model.
            ask: answers the questions at some indices.
            window: questions to ask at once; their answers are stored before the next ones are asked.
        """
        keys = [digest(question) for question in questions]
        known = self.store.load(keys)
        # Equal questions are asked once.
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in first.items() if key not in known)
        for start in range(0, len(missing), window):
            indices = missing[start : start + window]
            new = {keys[index]: answer for index, answer in zip(indices, ask(indices), strict=True)}
            self.store.store(new)
            known |= new
        return [known[key] for key in keys]

    def count_missing(self, questions: Sequence[Any]) -> int:
        """Return how many different questions are not in the cache."""
        keys = {digest(question) for question in questions}
        return len(keys) - len(self.store.load(list(keys)))
