"""Default recipe of a stage: the quickstart, or for other bases the stage's recipe on public data."""

from collections.abc import Mapping
from typing import Any

from finetune.recipe.discovery import load_stage
from finetune.recipe.runs import find_run, finished_record
from finetune.recipe.start import is_recipe

QUICKSTART, EMBEDDED = "quickstart", "tiny"


def default_recipe(stage: str, given: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the name of a stage's default recipe, and notes for the user.

    Args:
        stage: the stage.
        overrides: values of --base, --from and other options, by recipe key.

    Raises:
        UserError: --from is not a finished run.
    """
    # The quickstart's data and learning rates are chosen for the embedded base.
    base = given.get("model.base") or _base_of_start(given.get("model.start"))
    if base in (None, EMBEDDED):
        return QUICKSTART, []
    public: str = load_stage(stage).PUBLIC
    return public, [f"no recipe given: using '{public}' ({QUICKSTART} is for base '{EMBEDDED}')"]


def _base_of_start(start: str | None) -> str | None:
    if start is None or is_recipe(start):
        return None
    base: str = finished_record(find_run(start)[0])["load"]["model"]["base"]
    return base
