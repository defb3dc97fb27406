"""Fingerprint of a run: a digest of its inputs besides its settings (data, parent run, functions, models).

A run whose user functions were changed while it was interrupted may resume if the user accepts that.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.files import data_fingerprint
from finetune.recipe.python_function import PythonFunction
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import read_finished_record
from finetune.recipe.settings import StageSettings
from finetune.recipe.user_function import file_digest
from finetune.training.stored_rows import other_row_digests


def run_fingerprint(settings: StageSettings, *, function_digest: Callable[..., str] = file_digest) -> str:
    """Return a digest of the data's content, the parent run's weights, and the other files that a run uses.

    Args:
        settings: the recipe's settings.
        function_digest: (``file.py:function``, ``where=`` its key) -> digest of the file.

    Raises:
        UserError: missing data, a parent that is not a finished run, or a missing Python file.
    """
    fingerprint = data_fingerprint(settings.data)
    parent = parent_run_record(settings)
    if parent is not None:
        # The parent's weights, not its name or path: a run from a copy of the parent is the same run.
        fingerprint = _json_sha256([fingerprint, parent["files"]])
    extra_digests = [digest for _, section in settings for digest in section.input_digests(function_digest)]
    extra_digests += other_row_digests(settings)
    return _json_sha256([fingerprint, *extra_digests]) if extra_digests else fingerprint


def function_digests(settings: StageSettings) -> dict[str, str]:
    """Return the digest of each user function that is part of the fingerprint, by ``file.py:function``.

    Raises:
        UserError: a Python file is missing.
    """
    digests: dict[str, str] = {}

    def collect(text: str | PythonFunction, *, where: str) -> str:
        digests[str(text)] = file_digest(text, where=where)
        return digests[str(text)]

    for _, section in settings:
        section.input_digests(collect)
    return digests


def parent_run_record(settings: StageSettings) -> dict[str, Any] | None:
    """Return run.json's section on the parent run; None if the run starts from a base.

    Raises:
        UserError: the parent is not a finished run.
    """
    if settings.model.init_from is None:
        return None
    path = Path(settings.model.init_from)
    record = read_finished_record(path)
    description = {
        "name": path.name,
        "folder": str(path),
        "stage": record["stage"],
        "recipe": record["recipe"],
    }
    return {**description, "digest": record["digest"], "files": record["files"]}


@dataclass(frozen=True)
class CodeChange:
    """Changed code of user functions since the last start of a run.

    Attributes:
        functions: ``file.py:function`` -> digests of its file, then and now.
        digest_before: digest of the run at its last start.
        fingerprint_before: its fingerprint.
    """

    functions: Mapping[str, tuple[str, str]]
    digest_before: str
    fingerprint_before: str

    @property
    def files(self) -> str:
        """Return the changed files, for messages."""
        return ", ".join(dict.fromkeys(text.rpartition(":")[0] for text in self.functions))

    def record(self, *, step: int, digest: str) -> dict[str, Any]:
        """Return the entry of run.json: both digests of run and files, and the step before the change."""
        functions = {
            text: {"before": before, "after": after} for text, (before, after) in self.functions.items()
        }
        digests = {"digest_before": self.digest_before, "digest_after": digest}
        return {
            "step": step,
            **digests,
            "fingerprint_before": self.fingerprint_before,
            "functions": functions,
        }


def find_code_change(recipe: Recipe, record: Mapping[str, Any]) -> CodeChange | None:
    """Return what changed between a run and a recipe if that is code alone; None if anything else differs.

    Args:
        recipe: the recipe.
        record: run.json of the run.

    Raises:
        UserError: missing data or a missing Python file.
    """
    then: dict[str, str] = record.get("functions", {})
    now = function_digests(recipe.settings) if then else {}
    changed = {text: (then[text], now[text]) for text in then if text in now and then[text] != now[text]}
    if not changed or then.keys() != now.keys():
        return None
    # With the code of then the recipe is that run, if nothing else has changed.
    fingerprint = run_fingerprint(recipe.settings, function_digest=lambda text, *, where: then[str(text)])
    if recipe.digest(fingerprint) != record["digest"]:
        return None
    return CodeChange(changed, record["digest"], fingerprint)


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
