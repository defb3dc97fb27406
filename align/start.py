"""A recipe that needs other recipes' runs: found where they are finished, made first where they are not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from align.planning.machine import started_on
from align.rl.rewards.settings import RewardSource, RewardsSettings
from finetune.planning.devices import this_machine
from finetune.planning.solver import Machine, settled
from finetune.planning.world import world
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe, load
from finetune.recipe.runs import find_run
from finetune.recipe.start import is_recipe
from finetune.training.launch import run_stage
from finetune.training.run_directory import RunDirectory


def ready(recipe: Recipe, console: Console) -> Recipe:
    """Return the recipe with settings that go together here, finished runs as its start and as its rewards.

    Args:
        recipe: its ``model.start`` and its ``reward.sources`` may be ``stage/recipe``; such a recipe's run is
            found by its digest.
        console: where a run that comes first shows its progress.

    Raises:
        UserError: settings that do not go together; mistakes in a recipe that comes first, or in its data.
        Interrupted: a signal came while it ran.
        NotFiniteError: its loss or gradient became NaN or infinite.
    """
    recipe = settled(recipe, _machine(recipe))
    start = recipe.settings.model.start
    if start is not None and is_recipe(start):
        recipe = _starting_from(_made(start, recipe, console, "starts from"), recipe)
    reward = dict(recipe.settings).get("reward")
    return _rewarded(recipe, reward, console) if isinstance(reward, RewardsSettings) else recipe


def _machine(recipe: Recipe) -> Machine:
    """Return what it is started on: the processes of a launcher of the user's, or those that it asks for."""
    found, number = this_machine()
    if (size := world().size) > 1:  # on other machines too, so that this one's GPUs are no limit
        return Machine(found.kind, found.bfloat16, size)
    return started_on(recipe, found, number)


def _rewarded(recipe: Recipe, reward: RewardsSettings, console: Console) -> Recipe:
    """Return the recipe with folders of finished runs in place of what its reward runs are called."""
    sources: list[RewardSource] = []
    notes: list[str] = []
    for index, source in enumerate(reward.sources):
        if source.run is None:
            sources.append(source)
            continue
        if is_recipe(source.run):
            run = _made(source.run, recipe, console, "is rewarded by")
        else:
            run, note = find_run(source.run, where=f"reward.sources[{index}].run")
            notes += [note] if note else []
        sources.append(source.model_copy(update={"run": str(run)}))
    section = reward.model_copy(update={"sources": sources})
    settings = recipe.settings.model_copy(update={"reward": section})
    return replace(recipe, settings=settings, notes=recipe.notes + notes)


def _made(text: str, recipe: Recipe, console: Console, verb: str) -> Path:
    """Return the folder of a recipe's finished run; it runs now if need be."""
    stage, _, name = text.partition("/")
    first = ready(load(stage, name), console)
    run = RunDirectory.of(first, force=False)
    if run.finished:
        _say(console, f"{verb} {run.path} ({text})")
    else:
        _say(console, f"{verb} {run.path}, the run of {text}: it is not finished, and runs first")
        _refuse_world(text, recipe)
        run_stage(first, console, command=f"llm-align {stage} {name}")
        _say(console, f"{run.path} is finished; now {recipe.stage} {recipe.name}")
    return run.path


def _refuse_world(text: str, recipe: Recipe) -> None:
    """Raise UserError where a launcher of the user's has started processes for the second recipe."""
    if world().size > 1:
        found = f"{text} has not run, and a launcher has started {world().size} processes for {recipe.stage}"
        repair = f"run {text} first; or leave the launcher out: llm-align starts the processes it needs"
        raise UserError(Problem(f"{recipe.stage} {recipe.name}", found, "its run, finished", repair))


def _starting_from(run: Path, recipe: Recipe) -> Recipe:
    """Return the recipe with a run as its start; a run of full tuning becomes its base."""
    update: dict[str, Any] = {"start": str(run)}
    if (run / "model").is_dir():
        update |= {"base": str(run), "revision": None, "rope": None}
    model = recipe.settings.model.model_copy(update=update)
    return replace(recipe, settings=recipe.settings.model_copy(update={"model": model}))


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
