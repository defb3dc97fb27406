"""Which recipe serves where none is named: the quickstart, or for another base the stage's public one."""

from collections.abc import Mapping
from typing import Any

from finetune.recipe.discovery import load_stage
from finetune.recipe.runs import find_run, finished_record
from finetune.recipe.start import is_recipe

QUICKSTART, EMBEDDED = "quickstart", "tiny"


def default_recipe(stage: str, given: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the name of the recipe that a stage runs when none is named, and what to tell of it.

    The quickstart's data and learning rates are made for the embedded base; any other one gets the recipe of
    public data that the stage's module names as ``PUBLIC``.

    Args:
        stage: the stage.
        given: what --base, --from and their like say.

    Raises:
        UserError: --from names no finished run.
    """
    base = given.get("model.base") or _base_of_start(given.get("model.start"))
    if base in (None, EMBEDDED):
        return QUICKSTART, []
    public: str = load_stage(stage).PUBLIC
    return public, [f"no recipe is named: '{public}' serves ({QUICKSTART} is for the base '{EMBEDDED}')"]


def _base_of_start(start: str | None) -> str | None:
    if start is None or is_recipe(start):
        return None
    base: str = finished_record(find_run(start)[0])["load"]["model"]["base"]
    return base
