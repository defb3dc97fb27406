"""Runs by name: their folders, their records, and what to do about one that cannot be used."""

import json
from pathlib import Path
from typing import Any

from finetune.recipe.errors import Problem, UserError, nearest

RUNS = Path("runs")
FINISHED = "finished"
ALL_RUNS = "`llm-align list runs` shows them"


def read_record(path: Path) -> dict[str, Any]:
    """Return a folder's run.json, or nothing where there is none.

    Raises:
        UserError: the file is damaged.
    """
    file = path / "run.json"
    if not file.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        repair = "delete the folder, or choose another --out"
        raise UserError(Problem(str(file), "damaged", "the JSON that a run writes", repair)) from error
    if not isinstance(record, dict) or not {"status", "recipe", "digest"} <= record.keys():
        found = "not written by llm-align"
        raise UserError(Problem(str(file), found, "the JSON that a run writes", "choose another --out"))
    return record


def finished_record(run: Path) -> dict[str, Any]:
    """Return a finished run's run.json.

    Raises:
        UserError: the folder is no finished run.
    """
    record = read_record(run)
    if record.get("status") != FINISHED:
        found = f"a run that is {record['status']}" if record else "no run"
        raise UserError(Problem(str(run), found, "the folder of a finished run", _way_on(record)))
    return record


def record_of_writer(run: Path) -> dict[str, Any]:
    """Return the run.json of a finished run whose model writes text.

    Raises:
        UserError: the folder is no finished run, or its model scores texts.
    """
    record = finished_record(run)
    if "heads" in record["load"]:
        found = "a reward model, which writes no text"
        repair = f"`llm-align score {run} FILE` scores the completions of a file"
        raise UserError(Problem(str(run), found, "a model that does", repair))
    return record


def find_run(name: str, *, where: str = "model.start") -> tuple[Path, str]:
    """Return the finished run that a name means, and a note where it was chosen among several.

    Of several the newest is meant; those that went on from another one of them do not count, so that the same
    command means the same run when its own is finished.

    Args:
        name: a run's folder, the name of a folder below ./runs, or the beginning of such a name.
        where: the recipe's key, for the message.

    Raises:
        UserError: there is none, or none of them is finished.
    """
    folder = Path(name).expanduser()
    for path in (folder, RUNS / name):
        if (path / "run.json").is_file():
            finished_record(path)
            return path, ""
    called = [path for path in _runs() if path.name.startswith(name.removeprefix(f"{RUNS}/"))]
    if not called:
        raise UserError(_no_run(name, folder, where))
    records = {path: read_record(path) for path in called}
    done = [path for path in called if records[path]["status"] == FINISHED]
    if not done:
        finished_record(max(called, key=lambda path: records[path].get("started", "")))
    names = {path.name for path in done}
    first = [path for path in done if records[path].get("start", {}).get("name") not in names] or done
    newest = max(first, key=lambda path: records[path].get("finished", ""))
    note = f"'{name}' begins the names of {len(done)} finished runs; the newest is taken: {newest}"
    return newest, note if len(done) > 1 else ""


def _runs() -> list[Path]:
    return [path for path in sorted(RUNS.glob("*/")) if (path / "run.json").is_file()]


def _no_run(name: str, folder: Path, where: str) -> Problem:
    expected = "a finished run: its folder, its name below ./runs or the beginning of it, or stage/recipe"
    if not folder.is_dir():
        found = f"there is no run '{name}'"
        close = nearest(name.removeprefix(f"{RUNS}/"), [path.name for path in _runs()])
        return Problem(where, found, expected, close or ALL_RUNS)
    found = f"folder '{name}' is no run (it has no run.json)"
    if (folder.parent / "run.json").is_file():
        return Problem(where, found, expected, f"did you mean '{folder.parent}'?")
    if (folder / "config.json").is_file():
        return Problem(where, found, expected, f"it is a model: --base {name}")
    return Problem(where, found, expected, ALL_RUNS)


def _way_on(record: dict[str, Any]) -> str:
    """Return what to do about a run that is not finished."""
    ways = {
        "interrupted": "`{}` goes on from its checkpoint",
        "running": "wait for its end; if it was killed, `{}` goes on from its last checkpoint",
    }
    if record.get("status") in ways and "command" in record:
        return ways[record["status"]].format(record["command"])
    return ALL_RUNS
