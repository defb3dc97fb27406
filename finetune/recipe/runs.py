"""Find runs by name or prefix, and read their records (run.json)."""

import json
from pathlib import Path
from typing import Any

from finetune.recipe.errors import Problem, UserError, nearest

RUNS = Path("runs")
FINISHED = "finished"
ALL_RUNS = "see `llm-align list runs`"


def read_record(path: Path) -> dict[str, Any]:
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
        found = "not written by llm-align"
        raise UserError(Problem(str(file), found, "the JSON record of a run", "choose another --out"))
    return record


def finished_record(run: Path) -> dict[str, Any]:
    """Return a finished run's run.json.

    Raises:
        UserError: the folder is not a finished run.
    """
    record = read_record(run)
    if record.get("status") != FINISHED:
        found = f"a run with status '{record['status']}'" if record else "not a run"
        raise UserError(Problem(str(run), found, "the folder of a finished run", _way_on(record)))
    return record


def record_of_writer(run: Path) -> dict[str, Any]:
    """Return the run.json of a finished run with a generative model.

    Raises:
        UserError: the folder is not a finished run, or its model is a reward model.
    """
    record = finished_record(run)
    # Only reward models have heads.
    if "heads" in record["load"]:
        found = "a reward model, which cannot generate text"
        repair = f"`llm-align score {run} FILE` scores the completions of a file"
        raise UserError(Problem(str(run), found, "a run with a generative model", repair))
    return record


def find_run(name: str, *, where: str = "model.start") -> tuple[Path, str]:
    """Return the finished run of a name or prefix, and a note if several match.

    The newest match wins, without those that continue from another match: so the same command still refers to
    the same parent after its own run has finished.

    Args:
        name: a run's folder, the name of a folder in ./runs, or a prefix of such a name.
        where: the recipe's key, for the message.

    Raises:
        UserError: no run matches, or none of them is finished.
    """
    folder = Path(name).expanduser()
    for path in (folder, RUNS / name):
        if (path / "run.json").is_file():
            finished_record(path)
            return path, ""
    # A run's name is stage, recipe and digest; users type it without the digest.
    called = [path for path in _runs() if path.name.startswith(name.removeprefix(f"{RUNS}/"))]
    if not called:
        raise UserError(_no_run(name, folder, where))
    records = {path: read_record(path) for path in called}
    done = [path for path in called if records[path]["status"] == FINISHED]
    # Raises with the repair for the most recent unfinished run.
    if not done:
        finished_record(max(called, key=lambda path: records[path].get("started", "")))
    names = {path.name for path in done}
    first = [path for path in done if records[path].get("start", {}).get("name") not in names] or done
    newest = max(first, key=lambda path: records[path].get("finished", ""))
    note = f"'{name}' matches {len(done)} finished runs; using the newest: {newest}"
    return newest, note if len(done) > 1 else ""


def _runs() -> list[Path]:
    return [path for path in sorted(RUNS.glob("*/")) if (path / "run.json").is_file()]


def _no_run(name: str, folder: Path, where: str) -> Problem:
    expected = "a finished run: its folder, its name in ./runs or a prefix of it, or stage/recipe"
    if not folder.is_dir():
        found = f"there is no run '{name}'"
        close = nearest(name.removeprefix(f"{RUNS}/"), [path.name for path in _runs()])
        return Problem(where, found, expected, close or ALL_RUNS)
    found = f"folder '{name}' is not a run (no run.json)"
    if (folder.parent / "run.json").is_file():
        return Problem(where, found, expected, f"did you mean '{folder.parent}'?")
    if (folder / "config.json").is_file():
        return Problem(where, found, expected, f"it is a model: use --base {name}")
    return Problem(where, found, expected, ALL_RUNS)


def _way_on(record: dict[str, Any]) -> str:
    """Return the repair for a run that is not finished."""
    ways = {
        "interrupted": "`{}` resumes from its checkpoint",
        "running": "wait until it finishes; if it was killed, `{}` resumes from its last checkpoint",
    }
    if record.get("status") in ways and "command" in record:
        return ways[record["status"]].format(record["command"])
    return ALL_RUNS
