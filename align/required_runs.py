"""Resolve the runs a recipe depends on: reuse finished ones, and run the missing ones first.

``--dry-run`` plans the same runs and starts none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from align.data_check import data_problems, function_problems
from align.planner.process_memory import with_checked_processes
from align.planner.target_device import launch_target
from align.rl.rewards.settings import RewardSource, RewardsSettings
from finetune.distributed.deepspeed_setup import check_deepspeed_installed
from finetune.distributed.hardware import detect_devices
from finetune.distributed.rank import dist_info
from finetune.distributed.solver import LaunchTarget, resolve
from finetune.recipe.checkpoint_folder import model_folder
from finetune.recipe.compatibility import caught
from finetune.recipe.discovery import verb_of
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.parent_run import is_recipe_name
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.recipe.runs import FINISHED, RUNS_FOLDER, find_run
from finetune.recipe.terminal import command_line
from finetune.recipe.user_arguments import load_graders
from finetune.training.launch import launch_stage
from finetune.training.run_directory import RunDirectory


def resolve_required_runs(recipe: Recipe, console: Console) -> Recipe:
    """Return the recipe with resolved settings, and finished runs as its parent run and rewards.

    Args:
        recipe: ``model.init_from`` and ``rewards.sources`` may be ``stage/recipe``; the run of such a recipe
            is found by its digest, or runs now.
        console: console for the progress of runs that come first.

    Raises:
        UserError: incompatible settings, or invalid settings or data of a recipe that runs first.
        Interrupted: stopped by a signal during such a run.
        NotFiniteError: its loss or gradient became NaN or infinite.
    """
    target = _target_machine(recipe)
    recipe = resolve(recipe, target)
    required = _with_required_runs(
        recipe, lambda reference, verb: _finished_run_of(reference, recipe, console, verb)
    )
    return with_checked_processes(required, target)


@dataclass(frozen=True)
class PlannedRun:
    """A run that a command would start, resume or only read.

    Attributes:
        recipe: the recipe with resolved settings.
        target: the machine that it would run on.
        directory: its run directory; None if the directory's name depends on a run that is not finished.
    """

    recipe: Recipe
    target: LaunchTarget
    directory: RunDirectory | None

    @property
    def path(self) -> Path:
        """Return the run directory, with ``*`` for a digest that is not known yet."""
        if self.directory is not None:
            return self.directory.path
        return self.recipe.out or RUNS_FOLDER / f"{self.recipe.stage}-{self.recipe.name}-*"

    @property
    def status(self) -> str:
        """Return the status of run.json; "" for a run that does not exist or is not known yet."""
        return str(self.directory.record.get("status", "")) if self.directory is not None else ""


def plan_runs(recipe: Recipe, *, force: bool, accept_changed_code: bool = False) -> list[PlannedRun]:
    """Return the runs of a recipe's command in order, its own last; nothing runs and nothing is written.

    Checked are the settings on this machine, user functions, rows, required runs and the run directory. Of
    large files the first rows are read, nothing of the Hub; neither the base nor torch is loaded.

    Args:
        recipe: the loaded recipe.
        force: an earlier run of the recipe is replaced.
        accept_changed_code: an interrupted run resumes although files of its user functions have changed.

    Raises:
        UserError: all problems found in the recipe, or in one that would run first.
    """
    settings = recipe.settings
    problems = caught(load_graders, settings.evaluate.graders)
    problems += caught(check_deepspeed_installed, settings.train.strategy)
    problems += data_problems(recipe, dry_run=True) + function_problems(settings)
    try:
        target = _target_machine(recipe)
        recipe = resolve(recipe, target)
    except UserError as error:
        raise UserError([*error.problems, *problems]) from error
    required: dict[str, PlannedRun] = {}

    def plan_required(reference: str, verb: str) -> Path:
        stage, _, name = reference.partition("/")
        runs = plan_runs(read_recipe(stage, name), force=False)
        # A policy and its reward model may start from the same run.
        required.update({f"{run.recipe.stage}/{run.recipe.name}": run for run in runs})
        if runs[-1].status != FINISHED:
            _check_launcher(reference, recipe)
        return runs[-1].path

    directory = None
    try:
        recipe = _with_required_runs(recipe, plan_required)
        if all(run.status == FINISHED for run in required.values()):
            directory = RunDirectory.of(recipe, force=force, accept_changed_code=accept_changed_code)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return [*required.values(), PlannedRun(recipe, target, directory)]


RunFinder = Callable[[str, str], Path]
"""(``stage/recipe``, what the recipe does with its run) -> the run's folder."""


def _with_required_runs(recipe: Recipe, find: RunFinder) -> Recipe:
    """Return the recipe with folders of runs in place of recipes."""
    parent = recipe.settings.model.init_from
    if parent is not None and is_recipe_name(parent):
        recipe = _with_parent_run(find(parent, "starts from"), recipe)
    reward = dict(recipe.settings).get("rewards")
    return _with_reward_runs(recipe, reward, find) if isinstance(reward, RewardsSettings) else recipe


def _target_machine(recipe: Recipe) -> LaunchTarget:
    """Return the machine to solve for: a launcher's processes, or those that the recipe requests."""
    device, num_devices = detect_devices()
    # Processes of a launcher may be on several machines: this one's number of GPUs is no limit.
    if (world_size := dist_info().world_size) > 1:
        return LaunchTarget(device.kind, device.bfloat16, world_size)
    return launch_target(recipe, device, num_devices)


def _with_reward_runs(recipe: Recipe, reward: RewardsSettings, find: RunFinder) -> Recipe:
    """Return the recipe with its reward runs replaced by folders of finished runs."""
    sources: list[RewardSource] = []
    notes: list[str] = []
    for index, source in enumerate(reward.sources):
        if source.run is None:
            sources.append(source)
            continue
        if is_recipe_name(source.run):
            run = find(source.run, "takes rewards from")
        else:
            run, note = find_run(source.run, where=f"rewards.sources[{index}].run")
            notes += [note] if note else []
        sources.append(source.model_copy(update={"run": str(run)}))
    section = reward.model_copy(update={"sources": sources})
    settings = recipe.settings.model_copy(update={"rewards": section})
    return replace(recipe, settings=settings, notes=recipe.notes + notes)


def _finished_run_of(reference: str, recipe: Recipe, console: Console, verb: str) -> Path:
    """Return the folder of a recipe's finished run, running it now if needed."""
    stage, _, name = reference.partition("/")
    required = resolve_required_runs(read_recipe(stage, name), console)
    run = RunDirectory.of(required, force=False)
    if run.finished:
        _print_plain(console, f"{verb} {run.path} ({reference})")
    else:
        _print_plain(console, f"{verb} {reference}, which has no finished run; running it first ({run.path})")
        _check_launcher(reference, recipe)
        launch_stage(required, console, command=command_line(verb_of(stage), name))
        _print_plain(console, f"{run.path} is finished; continuing with {recipe.stage} {recipe.name}")
    return run.path


def _check_launcher(reference: str, recipe: Recipe) -> None:
    """Raise UserError under torchrun or another launcher, whose processes are for the second recipe."""
    if dist_info().world_size > 1:
        launched = f"a launcher started {dist_info().world_size} processes for {recipe.stage}"
        actual = f"{reference} has no finished run, and {launched}"
        repair = f"run {reference} first, or run without a launcher: llm-align launches its processes itself"
        raise UserError(Problem(f"{recipe.stage} {recipe.name}", actual, "a finished run of it", repair))


def _with_parent_run(run: Path, recipe: Recipe) -> Recipe:
    """Return the recipe initialized from a run; a fully fine-tuned run also becomes its base."""
    update: dict[str, Any] = {"init_from": str(run)}
    if model_folder(run) is not None:
        # The saved model has no revision, and its config has the RoPE scaling already.
        update |= {"base": str(run), "revision": None, "rope": None}
    model = recipe.settings.model.model_copy(update=update)
    return replace(recipe, settings=recipe.settings.model_copy(update={"model": model}))


def _print_plain(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
