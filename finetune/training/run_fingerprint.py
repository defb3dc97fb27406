"""What a run is made of beside its settings: the content of its data, of its start, of programs and runs."""

import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.data.files import data_fingerprint
from finetune.recipe.runs import finished_record
from finetune.recipe.settings import StageSettings


def run_fingerprint(settings: StageSettings) -> str:
    """Return a digest of the data's content, of the weights that a run starts from, and of what else it uses.

    Raises:
        UserError: data that are not there, a start that is no finished run, or a program that is gone.
    """
    found = data_fingerprint(settings.data)
    start = start_record(settings)
    if start is not None:
        found = _sha256([found, start["files"]])
    used = [digest for _, section in settings for digest in section.made_of()]
    return _sha256([found, *used]) if used else found


def start_record(settings: StageSettings) -> dict[str, Any] | None:
    """Return what run.json says of the run's start, None where it starts from a base.

    Raises:
        UserError: the start is no finished run.
    """
    if settings.model.start is None:
        return None
    path = Path(settings.model.start)
    record = finished_record(path)
    names = {"name": path.name, "folder": str(path), "stage": record["stage"], "recipe": record["recipe"]}
    return {**names, "digest": record["digest"], "files": record["files"]}


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
