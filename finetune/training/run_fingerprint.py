"""Run fingerprint: digest of a run's inputs besides its settings (data, parent run, functions, models)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.data.files import data_fingerprint
from finetune.recipe.runs import finished_record
from finetune.recipe.settings import StageSettings


def run_fingerprint(settings: StageSettings) -> str:
    """Return a digest of the data's content, the parent run's weights, and the other files that a run uses.

    Raises:
        UserError: missing data, a parent that is not a finished run, or a missing Python file.
    """
    found = data_fingerprint(settings.data)
    start = start_record(settings)
    if start is not None:
        # The parent's weights, not its name or path: a run from a copy of the parent is the same run.
        found = _sha256([found, start["files"]])
    used = [digest for _, section in settings for digest in section.made_of()]
    return _sha256([found, *used]) if used else found


def start_record(settings: StageSettings) -> dict[str, Any] | None:
    """Return run.json's section on the parent run; None if the run starts from a base.

    Raises:
        UserError: the parent is not a finished run.
    """
    if settings.model.start is None:
        return None
    path = Path(settings.model.start)
    record = finished_record(path)
    names = {"name": path.name, "folder": str(path), "stage": record["stage"], "recipe": record["recipe"]}
    return {**names, "digest": record["digest"], "files": record["files"]}


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
