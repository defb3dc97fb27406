"""Resolve the runs a recipe depends on: reuse finished ones, and run the missing ones first."""

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
    """Return the recipe with resolved settings, and finished runs as its parent run and rewards.

    Args:
        recipe: ``model.start`` and ``reward.sources`` may be ``stage/recipe``; the run of such a recipe is
            found by its digest, or runs now.
        console: console for the progress of runs that come first.

    Raises:
        UserError: incompatible settings, or invalid settings or data of a recipe that runs first.
        Interrupted: stopped by a signal during such a run.
        NotFiniteError: its loss or gradient became NaN or infinite.
    """
    recipe = settled(recipe, _machine(recipe))
    start = recipe.settings.model.start
    if start is not None and is_recipe(start):
        recipe = _starting_from(_made(start, recipe, console, "starts from"), recipe)
    reward = dict(recipe.settings).get("reward")
    return _rewarded(recipe, reward, console) if isinstance(reward, RewardsSettings) else recipe


def _machine(recipe: Recipe) -> Machine:
    """Return the machine to solve for: a launcher's processes, or those that the recipe requests."""
    found, number = this_machine()
    if (size := world().size) > 1:  # possibly on several machines, so this one's GPU count is no limit
        return Machine(found.kind, found.bfloat16, size)
    return started_on(recipe, found, number)


def _rewarded(recipe: Recipe, reward: RewardsSettings, console: Console) -> Recipe:
    """Return the recipe with its reward runs replaced by folders of finished runs."""
    sources: list[RewardSource] = []
    notes: list[str] = []
    for index, source in enumerate(reward.sources):
        if source.run is None:
            sources.append(source)
            continue
        if is_recipe(source.run):
            run = _made(source.run, recipe, console, "takes rewards from")
        else:
            run, note = find_run(source.run, where=f"reward.sources[{index}].run")
            notes += [note] if note else []
        sources.append(source.model_copy(update={"run": str(run)}))
    section = reward.model_copy(update={"sources": sources})
    settings = recipe.settings.model_copy(update={"reward": section})
    return replace(recipe, settings=settings, notes=recipe.notes + notes)


def _made(text: str, recipe: Recipe, console: Console, verb: str) -> Path:
    """Return the folder of a recipe's finished run, running it now if needed."""
    stage, _, name = text.partition("/")
    first = ready(load(stage, name), console)
    run = RunDirectory.of(first, force=False)
    if run.finished:
        _say(console, f"{verb} {run.path} ({text})")
    else:
        _say(console, f"{verb} {text}, which has no finished run; running it first ({run.path})")
        _refuse_world(text, recipe)
        run_stage(first, console, command=f"llm-align {stage} {name}")
        _say(console, f"{run.path} is finished; continuing with {recipe.stage} {recipe.name}")
    return run.path


def _refuse_world(text: str, recipe: Recipe) -> None:
    """Raise UserError under torchrun or another launcher, whose processes are for the second recipe."""
    if world().size > 1:
        found = (
            f"{text} has no finished run, and a launcher started {world().size} processes for {recipe.stage}"
        )
        repair = f"run {text} first, or run without a launcher: llm-align launches its processes itself"
        raise UserError(Problem(f"{recipe.stage} {recipe.name}", found, "a finished run of it", repair))


def _starting_from(run: Path, recipe: Recipe) -> Recipe:
    """Return the recipe initialized from a run; a fully fine-tuned run also becomes its base."""
    update: dict[str, Any] = {"start": str(run)}
    if (run / "model").is_dir():
        update |= {"base": str(run), "revision": None, "rope": None}
    model = recipe.settings.model.model_copy(update=update)
    return replace(recipe, settings=recipe.settings.model_copy(update={"model": model}))


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
