"""Run a stage on the recipe's number of processes, without torchrun or `accelerate launch`.

Every process runs the complete stage. Under the user's own launcher (torchrun, accelerate, deepspeed, srun)
this process is one of them already. Heavy imports wait until a run needs them, so a finished run returns at
once.
"""

from importlib.util import find_spec

from rich.console import Console

from finetune.distributed.hardware import detect_hardware
from finetune.distributed.rank import dist_info
from finetune.distributed.strategies import ZERO_STAGES
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.training import auto_values
from finetune.training.result import Result
from finetune.training.run_directory import RunDirectory
from finetune.training.stage import run_stage


def launch_stage(recipe: Recipe, console: Console, *, force: bool = False, command: str = "") -> Result:
    """Run a recipe's stage, on several processes if the recipe says so, and return its result.

    Args:
        recipe: the recipe; its parent run and its reward models are finished runs.
        console: receives progress output.
        force: replace an existing run of this recipe.
        command: the command line, for run.json.

    Raises:
        UserError: the recipe or the data are invalid; nothing was written.
        Interrupted: a signal came; a checkpoint was saved.
        NotFiniteError: loss or gradient became NaN or infinite.
        LostProcessError: a process died.
    """
    _check_deepspeed_installed(recipe.settings.train.strategy)
    dist = dist_info()
    if dist.world_size > 1:
        rank_console = console if dist.is_main else Console(quiet=True)
        return run_stage(recipe, rank_console, force=force, command=command)
    if not RunDirectory.of(recipe, force=force).finished:
        num_processes, _ = auto_values.num_processes(recipe.settings.train.num_processes, detect_hardware())
        if num_processes > 1:
            from finetune.distributed.launcher import LaunchSpec, launch_processes

            launch_processes(LaunchSpec(recipe, force, command), num_processes)
            force = False  # the workers finished the run: below it is only read
    return run_stage(recipe, console, force=force, command=command)


def _check_deepspeed_installed(strategy: str) -> None:
    """Raise UserError for ZeRO without DeepSpeed installed."""
    if strategy in ZERO_STAGES and find_spec("deepspeed") is None:
        repair = "pip install 'llm-align[zero]' (Linux); or train.strategy=ddp"
        raise UserError(Problem("train.strategy", f"{strategy}, without DeepSpeed", "DeepSpeed", repair))
