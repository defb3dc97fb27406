"""Run fingerprint: digest of a run's inputs besides its settings (data, parent run, functions, models)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.data.sources import data_fingerprint
from finetune.recipe.runs import read_finished_record
from finetune.recipe.settings import StageSettings


def run_fingerprint(settings: StageSettings) -> str:
    """Return a digest of the data's content, the parent run's weights, and the other files that a run uses.

    Raises:
        UserError: missing data, a parent that is not a finished run, or a missing Python file.
    """
    fingerprint = data_fingerprint(settings.data)
    parent = parent_run_record(settings)
    if parent is not None:
        # The parent's weights, not its name or path: a run from a copy of the parent is the same run.
        fingerprint = _json_sha256([fingerprint, parent["files"]])
    extra_digests = [digest for _, section in settings for digest in section.input_digests()]
    return _json_sha256([fingerprint, *extra_digests]) if extra_digests else fingerprint


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


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
