"""Make a finished run of an interrupted one: its last checkpoint is saved, evaluated and reported.

No step is trained. What a run does at its end happens then: weights saved and reopened, held-out metrics and
samples after training, findings, report, status ``finished``.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from align.required_runs import resolve_required_runs
from finetune.recipe.checkpoint_folder import (
    checkpoint_steps,
    describe_steps,
    is_checkpoint,
    run_of_checkpoint,
)
from finetune.recipe.console import Terminal, working
from finetune.recipe.discovery import load_stage, verb_of
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.one_run import one_run
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.recipe.runs import (
    FINISHED,
    RECIPE_FILE,
    RUNNING,
    find_any_run,
    read_run_record,
    refuse_outdated,
    resume_command,
)
from finetune.recipe.settings import StageSettings
from finetune.recipe.terminal import command_line
from finetune.training.fingerprint import find_code_change, run_fingerprint
from finetune.training.launch import launch_stage
from finetune.training.longer_run import rest_command
from finetune.training.result import Result


def finish_run(name: str, *, accept_changed_code: bool = False, console: Console | None = None) -> Result:
    """Finish a run at its last checkpoint and return its result; a finished run is returned at once.

    Args:
        name: the run's folder, its name in ./runs or a prefix of it.
        accept_changed_code: finish the run although files of its user functions have changed.
        console: receives the progress; None: the terminal.

    Raises:
        UserError: there is no such run, it is in progress, it has no checkpoint, or its inputs have changed.
        NotFiniteError: a metric of its weights is NaN or infinite.
    """
    console = console or Terminal()
    with one_run(f"finish {name}"), working(console, "preparing the run"):
        run, note = find_any_run(name)
        if note:
            console.print(note, highlight=False, markup=False, soft_wrap=True)
        recipe = _recipe_of(run)
        result = launch_stage(
            resolve_required_runs(recipe, console),
            console,
            accept_changed_code=accept_changed_code,
            command=str(read_run_record(run).get("command", "")),
            finish=True,
        )
        report_early_finish(result, recipe.settings, console)
        return result


def report_early_finish(result: Result, settings: StageSettings, console: Console) -> None:
    """Say of a run that was finished early where it ended, and what trains on."""
    if "finished_early" not in result.record:
        return
    further = rest_command(result.directory, result.record, settings)
    text = f"finished early, at {_unit(result)} {describe_steps(result.record)}; `{further}` trains on"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _unit(result: Result) -> str:
    return str(result.record["finished_early"]["unit"])


def _recipe_of(run: Path) -> Recipe:
    """Return the recipe of a run that can be finished.

    Raises:
        UserError: the run cannot be finished.
    """
    if is_checkpoint(run):
        home = run_of_checkpoint(run)
        repair = command_line("finish", home)
        raise UserError(Problem(str(run), "a checkpoint", "its run, whose last checkpoint is taken", repair))
    record = read_run_record(run)
    refuse_outdated(str(run), record)
    if record["status"] == RUNNING:
        repair = "wait until it finishes, or stop it: Ctrl-C saves a checkpoint"
        raise UserError(Problem(str(run), "a run in progress", "a run that has stopped", repair))
    command = resume_command(record)
    # Rejection sampling has rounds, and checkpoints in each of them.
    has_rounds = hasattr(load_stage(str(record.get("stage"))), "run")
    if record["status"] != FINISHED and not has_rounds and not checkpoint_steps(run):
        repair = f"`{command}` starts it again; train.checkpoint_every sets the steps between checkpoints"
        actual = f"a run with status '{record['status']}' and no checkpoint"
        raise UserError(Problem(str(run), actual, "a run with a checkpoint", repair))
    if not (run / RECIPE_FILE).is_file():
        raise UserError(
            Problem(str(run), f"no {RECIPE_FILE}", "the files of a run", f"`{command}` resumes it")
        )
    recipe = replace(read_recipe(str(record["stage"]), str(run / RECIPE_FILE)), out=run)
    is_same = recipe.digest(run_fingerprint(recipe.settings)) == record["digest"]
    if record["status"] != FINISHED and not is_same and find_code_change(recipe, record) is None:
        actual = "its data, its parent run or another input has changed since it started"
        repair = f"`{command_line(verb_of(recipe.stage), run, '--from', run)}` trains on from its weights"
        raise UserError(Problem(str(run), actual, "the inputs that it was started with", repair))
    return recipe
