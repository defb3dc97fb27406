"""Which run a recipe continues: that of its name, one with other code, or one that it trains longer."""

from pathlib import Path
from typing import Any

from finetune.recipe import yaml_file
from finetune.recipe.differences import differing_settings, flat_settings
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import FINISHED, RECIPE_FILE, RUNS_FOLDER, is_outdated, read_run_record
from finetune.training.fingerprint import CodeChange, find_code_change
from finetune.training.longer_run import LongerRun, find_longer_run

REPLACED = "replaced"
ACCEPT_REPAIR = "the same command with --accept-changed-code resumes the run with the new code"
MAX_DIFFERENCES = 3


def default_path(recipe: Recipe, digest: str) -> Path:
    """Return the folder of a run without --out: by its name, or where a run of this digest is already."""
    # A run's own recipe.yaml, unchanged, continues that run, wherever its folder is now.
    if recipe.run is not None and read_run_record(recipe.run)["digest"] == digest:
        return recipe.run
    path = RUNS_FOLDER / f"{recipe.stage}-{recipe.name}-{digest}"
    if path.is_dir():
        return path
    # A run that resumed with changed code, or was trained longer, keeps the name of its first start.
    return next((folder for folder, record in _runs_of(recipe) if record["digest"] == digest), path)


def interrupted_with_other_code(recipe: Recipe, digest: str) -> tuple[Path, str] | None:
    """Return the newest interrupted run that differs from a recipe in code alone, and the changed files."""
    own = [(recipe.run, read_run_record(recipe.run))] if recipe.run is not None else []
    changes = {
        folder: (str(record.get("started", "")), change.files)
        for folder, record in [*own, *_runs_of(recipe)]
        if record.get("functions")
        and record["digest"] != digest
        and record["status"] not in (FINISHED, REPLACED)
        and (change := find_code_change(recipe, record)) is not None
    }
    if not changes:
        return None
    newest = max(changes, key=lambda folder: changes[folder][0])
    return newest, changes[newest][1]


def own_longer_run(recipe: Recipe, fingerprint: str) -> LongerRun | None:
    """Return the run whose own recipe a user has lengthened (``llm-align sft RUN train.max_steps=200``)."""
    if recipe.run is None:
        return None
    return find_longer_run(recipe.run, recipe, read_run_record(recipe.run), fingerprint)


def shorter_run_note(recipe: Recipe, fingerprint: str) -> str:
    """Return a note on a run that a new run could continue instead of repeating its steps, or ""."""
    for folder, record in _runs_of(recipe):
        # First what run.json says: a sweep has many runs.
        if record.get("schedule", {}).get("decay") != "constant":
            continue
        if record.get("seed") != recipe.settings.train.seed:
            continue
        longer = find_longer_run(folder, recipe, record, fingerprint)
        if longer is not None and longer.early_problem() is None:
            done = f"{folder} is this run with {longer.steps_done} steps"
            return f"{done}: the same command with --out {folder} continues it"
    return ""


def describe_differences(path: Path, recipe: Recipe) -> str:
    """Return the settings in which the run in a folder differs from a recipe."""
    file = path / RECIPE_FILE
    if not file.is_file():
        return ""
    then, now = yaml_file.read_yaml(file)[0], recipe.values()
    different = [
        f"{key}={yaml_file.format_value(old)} (here {yaml_file.format_value(new)})"
        for key, (old, new) in differing_settings([then, now]).items()
        # An earlier version may have had settings that this one does not have.
        if key in flat_settings(now)
    ]
    num_more = len(different) - MAX_DIFFERENCES
    return ", ".join(different[:MAX_DIFFERENCES]) + (f" and {num_more} more" if num_more > 0 else "")


def changed_code_problem(path: Path, change: CodeChange) -> Problem:
    """Return the problem of a run that was interrupted with other code of its user functions."""
    actual = f"an interrupted run with another version of {change.files}"
    repair = f"{ACCEPT_REPAIR}; with the old files in place it resumes with the old code"
    return Problem(str(path), actual, "the code that the run started with", repair)


def _runs_of(recipe: Recipe) -> list[tuple[Path, dict[str, Any]]]:
    """Return the runs of a recipe in ./runs, with their records."""
    runs = []
    for folder in sorted(RUNS_FOLDER.glob(f"{recipe.stage}-{recipe.name}-*/")):
        try:
            record = read_run_record(folder)
        except UserError:  # another run's damaged record does not concern this one
            continue
        if record and not is_outdated(record):
            runs.append((folder, record))
    return runs
