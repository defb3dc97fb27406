"""A stage on as many processes as its recipe asks for; the user types no launcher.

Each process runs the whole stage; under a launcher of the user's (torchrun, accelerate, deepspeed, srun) this
process is one of them already. Nothing heavy is imported before a run needs it: one that is finished answers
at once.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console

from finetune.planning import choices
from finetune.planning.compatibility import ZERO
from finetune.planning.hardware import detect
from finetune.planning.world import world
from finetune.recipe.discovery import load_stage
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from finetune.training.result import Result


def run_stage(recipe: Recipe, console: Console, *, force: bool = False, command: str = "") -> "Result":
    """Run a recipe's stage, on several processes if it asks for them, and return its result.

    Args:
        recipe: what to do; its start and its rewards are finished runs.
        console: where progress is shown.
        force: start over where a run of this recipe is there already.
        command: the words that started it, for the record.

    Raises:
        UserError: the user's mistakes, before anything is written.
        Interrupted: a signal came; a checkpoint is there.
        NotFiniteError: loss or gradient became NaN or infinite.
        LostProcessError: a process ended before its work did.
    """
    _refuse_without_library(recipe.settings.train.strategy)
    stage, place = load_stage(recipe.stage), world()
    if place.size > 1:
        shown = console if place.main else Console(quiet=True)
        return stage.run(recipe, shown, force=force, command=command)  # type: ignore[no-any-return]
    if not RunDirectory.of(recipe, force=force).finished:
        count, _ = choices.processes(recipe.settings.train.processes, detect())
        if count > 1:
            from finetune.training.elastic import Work, start_processes

            start_processes(Work(recipe, force, command), count)
            force = False
    return stage.run(recipe, console, force=force, command=command)  # type: ignore[no-any-return]


def _refuse_without_library(strategy: str) -> None:
    """Raise UserError for ZeRO where DeepSpeed, which carries it out, is not installed."""
    if strategy in ZERO and find_spec("deepspeed") is None:
        repair = "pip install 'llm-align[zero]' (Linux); or train.strategy=ddp"
        raise UserError(Problem("train.strategy", f"{strategy}, without DeepSpeed", "DeepSpeed", repair))
