"""Find runs by name or prefix, and read their records (run.json)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.recipe.errors import Problem, UserError, did_you_mean

RUNS_FOLDER = Path("runs")
ROWS_FOLDER = "rows"
"""Folder of a run with the rows that were given in Python, one file per recipe key."""
RECIPE_FILE = "recipe.yaml"
FINISHED = "finished"
FORMAT = 2
"""Format of run.json and of checkpoints: incremented when a stored name changes."""
LIST_RUNS_HINT = "see `llm-align list runs`"


def read_run_record(path: Path) -> dict[str, Any]:
    """Return a folder's run.json, {} if there is none.

    Raises:
        UserError: the file is corrupt.
    """
    file = path / "run.json"
    if not file.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        repair = "delete the folder, or choose another --out"
        raise UserError(Problem(str(file), "corrupt file", "the JSON record of a run", repair)) from error
    # Some other tool's run.json: nothing in this folder may be overwritten.
    if not isinstance(record, dict) or not {"status", "recipe", "digest"} <= record.keys():
        actual = "not written by llm-align"
        raise UserError(Problem(str(file), actual, "the JSON record of a run", "choose another --out"))
    return record


def run_of_recipe(path: Path) -> Path | None:
    """Return the run directory that a recipe file is the resolved recipe of, None for any other file."""
    is_resolved = path.name == RECIPE_FILE and (path.parent / "run.json").is_file()
    return path.parent if is_resolved and read_run_record(path.parent) else None


def is_stored_rows(file: Path) -> bool:
    """Return True for a run's or a pipeline's own copy of rows that were given in Python."""
    records = (file.parent.parent / name for name in ("run.json", "pipeline.json"))
    return file.parent.name == ROWS_FOLDER and any(record.is_file() for record in records)


def is_outdated(record: Mapping[str, Any]) -> bool:
    """Return True if a run was written by an earlier version, with other names."""
    return bool(record) and record.get("format") != FORMAT


def refuse_outdated(where: str, record: Mapping[str, Any]) -> None:
    """Raise UserError for a run that was written by an earlier version."""
    if is_outdated(record):
        actual = f"a run of an earlier version of llm-align (format {record.get('format', 1)})"
        repair = "run it again with this version, in another folder or with --force"
        raise UserError(Problem(where, actual, f"a run in format {FORMAT}", repair))


def read_finished_record(run: Path) -> dict[str, Any]:
    """Return a finished run's run.json.

    Raises:
        UserError: the folder is not a finished run.
    """
    record = read_run_record(run)
    refuse_outdated(str(run), record)
    if record.get("status") != FINISHED:
        actual = f"a run with status '{record['status']}'" if record else "not a run"
        raise UserError(Problem(str(run), actual, "the folder of a finished run", _next_action(record)))
    return record


def read_generative_record(run: Path) -> dict[str, Any]:
    """Return the run.json of a finished run with a generative model.

    Raises:
        UserError: the folder is not a finished run, or its model is a reward model.
    """
    record = read_finished_record(run)
    # Only reward models have heads.
    if "heads" in record["reload"]:
        actual = "a reward model, which cannot generate text"
        repair = f"`llm-align score {run} FILE` scores the completions of a file"
        raise UserError(Problem(str(run), actual, "a run with a generative model", repair))
    return record


def find_run(name: str, *, where: str = "model.init_from", recipes: bool = True) -> tuple[Path, str]:
    """Return the finished run of a name or prefix, and a note if several match.

    The newest match wins, without those that continue from another match: so the same command still refers to
    the same parent after its own run has finished.

    Args:
        name: a run's folder, the name of a folder in ./runs, or a prefix of such a name.
        where: the recipe's key, for the message.
        recipes: whether the message also offers stage/recipe.

    Raises:
        UserError: no run matches, or none of them is finished.
    """
    folder = Path(name).expanduser()
    for path in (folder, RUNS_FOLDER / name):
        if (path / "run.json").is_file():
            read_finished_record(path)
            return path, ""
    # A run's name is stage, recipe and digest; users type it without the digest.
    matches = [path for path in _run_folders() if path.name.startswith(name.removeprefix(f"{RUNS_FOLDER}/"))]
    if not matches:
        raise UserError(_missing_run_problem(name, folder, where, recipes=recipes))
    records = {path: read_run_record(path) for path in matches}
    finished = [
        path for path in matches if records[path]["status"] == FINISHED and not is_outdated(records[path])
    ]
    # Raises with the repair for the most recent unfinished run.
    if not finished:
        read_finished_record(max(matches, key=lambda path: records[path].get("started", "")))
    names = {path.name for path in finished}
    roots = [
        path for path in finished if records[path].get("init_from", {}).get("name") not in names
    ] or finished
    newest = max(roots, key=lambda path: records[path].get("finished", ""))
    note = f"'{name}' matches {len(finished)} finished runs; using the newest: {newest}"
    return newest, note if len(finished) > 1 else ""


def _run_folders() -> list[Path]:
    return [path for path in sorted(RUNS_FOLDER.glob("*/")) if (path / "run.json").is_file()]


def _missing_run_problem(name: str, folder: Path, where: str, *, recipes: bool) -> Problem:
    expected = "a finished run: its folder, its name in ./runs or a prefix of it"
    expected += ", or stage/recipe" if recipes else ""
    if not folder.is_dir():
        actual = f"there is no run '{name}'"
        suggestion = did_you_mean(
            name.removeprefix(f"{RUNS_FOLDER}/"), [path.name for path in _run_folders()]
        )
        return Problem(where, actual, expected, suggestion or LIST_RUNS_HINT)
    actual = f"folder '{name}' is not a run (no run.json)"
    if (folder.parent / "run.json").is_file():
        return Problem(where, actual, expected, f"did you mean '{folder.parent}'?")
    if (folder / "config.json").is_file():
        return Problem(where, actual, expected, f"it is a model: use --base {name}")
    return Problem(where, actual, expected, LIST_RUNS_HINT)


def _next_action(record: dict[str, Any]) -> str:
    """Return the repair for a run that is not finished."""
    actions = {
        "interrupted": "`{}` resumes from its checkpoint",
        "running": "wait until it finishes; if it was killed, `{}` resumes from its last checkpoint",
    }
    if record.get("status") in actions and "command" in record:
        return actions[record["status"]].format(record["command"])
    return LIST_RUNS_HINT
