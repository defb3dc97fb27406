"""The property matrix: what holds for an adapter on a family of models, or why it is not supported."""

import functools
import json
import os
import tempfile
from pathlib import Path

from adapter_properties import PROPERTIES

from finetune.recipe.errors import UserError


@functools.cache
def cell(name: str, method: str, family: str) -> str | None:
    """Return None where a property holds, or the reason why it is not supported."""
    file = _cells() / f"{name.replace(' ', '-')}-{method}-{family}.json"
    if not file.exists():
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_cell(name, method, family)), encoding="utf-8")
        partial.replace(file)
    reason: str | None = json.loads(file.read_text(encoding="utf-8"))
    return reason


def _cell(name: str, method: str, family: str) -> str | None:
    try:
        return PROPERTIES[name](method, family)
    except UserError as error:
        (problem,) = error.problems
        return problem.actual


@functools.cache
def _cells() -> Path:
    """Return where the processes of one run of the tests share results."""
    if run := os.environ.get("PYTEST_XDIST_TESTRUNUID"):
        folder = Path(tempfile.gettempdir()) / f"cells-{run}"
        folder.mkdir(exist_ok=True)
        return folder
    return Path(tempfile.mkdtemp(prefix="cells-"))
