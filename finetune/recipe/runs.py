"""Find runs by name or prefix, and read their records (run.json) and their status."""

import fcntl
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.recipe.checkpoint_folder import (
    checkpoint_record,
    checkpoint_step,
    checkpoint_steps,
    has_heads,
    is_checkpoint,
    last_checkpoint,
)
from finetune.recipe.errors import Problem, UserError, did_you_mean
from finetune.recipe.peft_folder import is_peft_folder, peft_record
from finetune.recipe.terminal import PROGRAM, command_line

RUNS_FOLDER = Path("runs")
ROWS_FOLDER = "rows"
"""Folder of a run with the rows that were given in Python, one file per recipe key."""
RECIPE_FILE = "recipe.yaml"
LOCK_FILE = ".lock"
"""The lock that a process holds on a run's or a pipeline's folder while it writes there."""
FINISHED, RUNNING, STOPPED = "finished", "running", "stopped"
FORMAT = 2
"""Format of run.json and of checkpoints: incremented when a stored name changes."""
LIST_RUNS_HINT = "see `llm-align list runs`"
REQUIRED_TEXTS = ("status", "recipe", "digest")
SECTIONS = ("reload", "files", "metrics", "summary", "seconds", "hardware", "init_from", "data", "versions")
"""Fields of run.json that are mappings."""
FINISHED_FIELDS = ("stage", "reload")
RUN_CONTENTS = ("recipe.yaml", "adapter", "model", "checkpoints")
"""Files and folders that only a run leaves: with one of them and without run.json, a run is damaged."""


@dataclass(frozen=True, slots=True)
class ListedRun:
    """A folder of ./runs.

    Attributes:
        path: the folder.
        record: its run.json; {} if it is damaged.
        damage: why its record cannot be used, or "".
    """

    path: Path
    record: dict[str, Any]
    damage: str = ""

    @property
    def is_finished(self) -> bool:
        """Return True for a finished run that this version can read."""
        return self.record.get("status") == FINISHED and not is_outdated(self.record)


def read_run_record(path: Path) -> dict[str, Any]:
    """Return a folder's run.json, {} if there is none; a run whose process has died is ``stopped``.

    Raises:
        UserError: the file is damaged, or not written by llm-align.
    """
    file = path / "run.json"
    repair = "delete the folder, or choose another --out"
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        actual = f"cannot be read: {error.strerror}"
        raise UserError(Problem(str(file), actual, "the JSON record of a run", repair)) from error
    # RecursionError: brackets without an end.
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(str(file), "corrupt file", "the JSON record of a run", repair)) from error
    # Some other tool's run.json: nothing in this folder may be overwritten.
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in REQUIRED_TEXTS):
        actual = "not written by llm-align"
        raise UserError(Problem(str(file), actual, "the JSON record of a run", "choose another --out"))
    if wrong := [name for name in SECTIONS if not isinstance(record.get(name, {}), dict)]:
        actual = f"corrupt file: {wrong[0]} is not a mapping"
        raise UserError(Problem(str(file), actual, "the JSON record of a run", repair))
    return with_live_status(path, record)


def with_live_status(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose status is that of its process: ``stopped`` for a running one without a lock."""
    if record.get("status") == RUNNING and not is_locked(folder):
        return {**record, "status": STOPPED}
    return record


def run_of_recipe(path: Path) -> Path | None:
    """Return the run directory that a recipe file is the resolved recipe of, None for any other file."""
    is_resolved = path.name == RECIPE_FILE and (path.parent / "run.json").is_file()
    return path.parent if is_resolved and read_run_record(path.parent) else None


def is_stored_rows(file: Path) -> bool:
    """Return True for a run's or a pipeline's own copy of rows that were given in Python."""
    records = (file.parent.parent / name for name in ("run.json", "pipeline.json"))
    return file.parent.name == ROWS_FOLDER and any(record.is_file() for record in records)


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of a run's or a pipeline's folder."""
    try:
        with (folder / LOCK_FILE).open("rb") as stream:
            # The kernel releases a lock with its process, however that ends. A shared lock needs no write
            # permission, and two readers do not exclude each other.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    # Held by another process; or it cannot be asked, as on some network file systems.
    except OSError:
        return True
    return False


def list_runs() -> list[ListedRun]:
    """Return the runs in ./runs in alphabetical order, damaged ones included."""
    folders = sorted(RUNS_FOLDER.glob("*/"))
    return [run for run in map(_list_run, folders) if run is not None]


def _list_run(folder: Path) -> ListedRun | None:
    """Return the run of a folder; None for a folder of something else."""
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        return ListedRun(folder, {}, f"cannot be read: {error.strerror}")
    if "run.json" not in names:
        return ListedRun(folder, {}, "run.json is missing") if names & set(RUN_CONTENTS) else None
    try:
        record = read_run_record(folder)
        damage = _record_damage(folder, record)
    except UserError as error:
        record, damage = {}, f"run.json: {error.problems[0].actual}"
    return ListedRun(folder, {} if damage else record, damage)


def _record_damage(folder: Path, record: Mapping[str, Any]) -> str:
    """Return what a finished run lacks, or ""."""
    # A dangling symbolic link is listed in its folder, and reads as no file.
    if not record:
        return "run.json is missing"
    if record["status"] != FINISHED or is_outdated(record):
        return ""
    if missing := [name for name in FINISHED_FIELDS if name not in record]:
        return f"run.json: {', '.join(missing)} missing"
    if missing := [name for name in record.get("files", {}) if not (folder / name).is_file()]:
        return f"{', '.join(missing)} missing"
    return ""


def is_outdated(record: Mapping[str, Any]) -> bool:
    """Return True if a run was written by an earlier version, with other names."""
    return bool(record) and record.get("format") != FORMAT


def refuse_outdated(where: str, record: Mapping[str, Any]) -> None:
    """Raise UserError for a run that was written by an earlier version."""
    if is_outdated(record):
        actual = f"a run of an earlier version of llm-align (format {record.get('format', 1)})"
        repair = "run it again with this version and another --out"
        raise UserError(Problem(where, actual, f"a run in format {FORMAT}", repair))


def read_finished_record(run: Path) -> dict[str, Any]:
    """Return a finished run's run.json, or what it would say of a checkpoint or of an adapter of PEFT.

    Raises:
        UserError: the folder is not a finished run.
    """
    if is_peft_folder(run):
        return peft_record(run)
    if is_checkpoint(run):
        return checkpoint_record(run)
    record = read_run_record(run)
    refuse_outdated(str(run), record)
    if record.get("status") != FINISHED:
        actual = f"a run with status '{record['status']}'" if record else "not a run"
        raise UserError(Problem(str(run), actual, "the folder of a finished run", _next_action(run, record)))
    if missing := [name for name in FINISHED_FIELDS if name not in record]:
        raise UserError(_damaged_run_problem(run, f"run.json: {', '.join(missing)} missing", record))
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
        repair = f"`{command_line('score', run, 'FILE')}` scores the completions of a file"
        raise UserError(Problem(str(run), actual, "a run with a generative model", repair))
    return record


def find_run(name: str, *, where: str = "model.init_from", recipes: bool = True) -> tuple[Path, str]:
    """Return the finished run of a name or prefix, and a note if several match.

    The newest match wins, without those that continue from another match: so the same command still refers to
    the same parent after its own run has finished.

    Args:
        name: a run's folder, the name of a folder in ./runs, or a prefix of such a name; or a folder with an
            adapter of PEFT.
        where: the recipe's key, for the message.
        recipes: whether the message also offers stage/recipe.

    Raises:
        UserError: no run matches, or none of them is finished.
    """
    folder = Path(name).expanduser()
    for path in (folder, RUNS_FOLDER / name):
        if (path / "run.json").is_file() or is_checkpoint(path) or is_peft_folder(path):
            if last := _usable_checkpoint(path):
                return last
            read_finished_record(path)
            return path, ""
    # A run's name is stage, recipe and digest; users type it without the digest.
    runs = list_runs()
    matches = [run for run in runs if run.path.name.startswith(name.removeprefix(f"{RUNS_FOLDER}/"))]
    if not matches:
        raise UserError(_missing_run_problem(name, folder, where, recipes=recipes))
    readable = [run for run in matches if not run.damage]
    if not readable:
        raise UserError([_damaged_run_problem(run.path, run.damage, run.record) for run in matches])
    finished = [run for run in readable if run.is_finished]
    # Raises with the repair for the most recent unfinished run, unless that has a checkpoint.
    if not finished:
        path = max(readable, key=lambda run: str(run.record.get("started", ""))).path
        if last := _usable_checkpoint(path):
            return last
        read_finished_record(path)
    names = {run.path.name for run in finished}
    roots = [run for run in finished if run.record.get("init_from", {}).get("name") not in names] or finished
    newest = max(roots, key=lambda run: str(run.record.get("finished", ""))).path
    note = f"'{name}' matches {len(finished)} finished runs; using the newest: {newest}"
    return newest, note if len(finished) > 1 else ""


def find_any_run(name: str) -> tuple[Path, str]:
    """Return the run of a name or prefix whatever its status, and a note if several match.

    The newest match that is not finished wins.

    Args:
        name: a run's folder, the name of a folder in ./runs, or a prefix of such a name.

    Raises:
        UserError: no run matches.
    """
    folder = Path(name).expanduser()
    for path in (folder, RUNS_FOLDER / name):
        if is_checkpoint(path) or read_run_record(path):
            return path, ""
    prefix = name.removeprefix(f"{RUNS_FOLDER}/")
    matches = [run for run in list_runs() if run.path.name.startswith(prefix)]
    readable = [run for run in matches if not run.damage]
    if not matches:
        raise UserError(_missing_run_problem(name, folder, "RUN", recipes=False))
    if not readable:
        raise UserError([_damaged_run_problem(run.path, run.damage, run.record) for run in matches])
    chosen = max(readable, key=lambda run: (not run.is_finished, str(run.record.get("started", ""))))
    note = f"'{name}' matches {len(readable)} runs; using {chosen.path}"
    return chosen.path, note if len(readable) > 1 else ""


def _usable_checkpoint(run: Path) -> tuple[Path, str] | None:
    """Return the last checkpoint of a run that stopped, if that can be loaded, and a note; else None."""
    record, folder = read_run_record(run), last_checkpoint(run)
    if not record or record["status"] in (FINISHED, RUNNING) or folder is None:
        return None
    unusable = has_heads(record) or is_outdated(record) or _failed_by_itself(record)
    if unusable or "reload" not in record or not is_checkpoint(folder):
        return None
    position = f"step {checkpoint_step(folder)} of {record.get('steps', '?')}"
    return folder, f"{run} is {record['status']} at {position}: using {folder}"


def _damaged_run_problem(run: Path, damage: str, record: Mapping[str, Any]) -> Problem:
    repair = repeat_repair(run, record) if "command" in record else "train it again with another --out"
    return Problem(str(run), f"a damaged run: {damage}", "the folder of a finished run", repair)


def _missing_run_problem(name: str, folder: Path, where: str, *, recipes: bool) -> Problem:
    expected = "a finished run: its folder, its name in ./runs or a prefix of it"
    expected += ", or stage/recipe" if recipes else ""
    if not folder.is_dir():
        actual = f"there is no run '{name}'"
        suggestion = did_you_mean(
            name.removeprefix(f"{RUNS_FOLDER}/"), [run.path.name for run in list_runs() if not run.damage]
        )
        return Problem(where, actual, expected, suggestion or LIST_RUNS_HINT)
    actual = f"folder '{name}' is not a run (no run.json)"
    if (folder.parent / "run.json").is_file():
        return Problem(where, actual, expected, f"did you mean '{folder.parent}'?")
    if (folder / "config.json").is_file():
        return Problem(where, actual, expected, f"it is a model: use --base {name}")
    return Problem(where, actual, expected, LIST_RUNS_HINT)


def _next_action(run: Path, record: dict[str, Any]) -> str:
    """Return the repair for a run that is not finished."""
    if record.get("status") == RUNNING:
        return "wait until it finishes"
    if "command" not in record or _failed_by_itself(record):
        return LIST_RUNS_HINT
    steps = checkpoint_steps(run)
    how = f"resumes from step {max(steps)}" if steps else "starts again: it has no checkpoint"
    return f"`{resume_command(record)}` {how}"


def _failed_by_itself(record: Mapping[str, Any]) -> bool:
    """Return whether a run failed by its own numbers or functions (NaN), and not by a library's exception."""
    return record.get("status") == "failed" and "cause" not in record


def resume_command(record: Mapping[str, Any]) -> str:
    """Return the command that a run was started with; never --force, which would delete its checkpoints."""
    return str(record["command"]).replace(" --force", "")


def repeat_repair(run: Path, record: Mapping[str, Any]) -> str:
    """Return the repair for a run whose files are damaged: train it again in another folder."""
    command = resume_command(record)
    # Runs that were started in Python have no command line.
    if not command.startswith(f"{PROGRAM} "):
        return "train it again with another --out"
    return f"train it again in another folder: `{command} --out {shlex.quote(f'{run}-again')}`"
