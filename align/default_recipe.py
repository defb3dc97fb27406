"""Default recipe of a stage: the quickstart, or for other bases the stage's recipe on public data."""

from collections.abc import Mapping
from typing import Any

from finetune.recipe.bases import EMBEDDED_BASE
from finetune.recipe.discovery import load_stage
from finetune.recipe.parent_run import is_recipe_name
from finetune.recipe.runs import find_run, read_finished_record

QUICKSTART = "quickstart"


def default_recipe(stage: str, overrides: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the name of a stage's default recipe, and notes for the user.

    Args:
        stage: the stage.
        overrides: values of --base, --from and other options, by recipe key.

    Raises:
        UserError: --from is not a finished run.
    """
    # The quickstart's data and learning rates are chosen for the bundled base.
    base = overrides.get("model.base") or _base_of_parent(overrides.get("model.init_from"))
    if base in (None, EMBEDDED_BASE):
        return QUICKSTART, []
    public: str = load_stage(stage).PUBLIC
    return public, [f"no recipe given: using '{public}' ({QUICKSTART} is for base '{EMBEDDED_BASE}')"]


def _base_of_parent(parent: str | None) -> str | None:
    if parent is None or is_recipe_name(parent):
        return None
    base: str = read_finished_record(find_run(parent)[0])["reload"]["model"]["base"]
    return base
