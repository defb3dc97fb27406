"""Processes on the CPU share its memory: a number of them that does not fit is refused before the start."""

from dataclasses import replace

from align.planner.plan import Plan, make_plan
from align.planner.terminal import format_bytes
from finetune.distributed.hardware import RESERVED_BYTES, Device, cpu_cores, cpu_device
from finetune.distributed.rank import dist_info
from finetune.distributed.solver import LaunchTarget
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.training.run_directory import RunDirectory

KEY = "train.num_processes"


def with_checked_processes(recipe: Recipe, target: LaunchTarget) -> Recipe:
    """Return the recipe, with a note on more processes than cores.

    Raises:
        UserError: the processes do not fit into the memory of this machine.
    """
    # A launcher's processes exist already.
    if target.device != "cpu" or target.processes == 1 or dist_info().world_size > 1:
        return recipe
    if not _is_finished(recipe) and (
        problems := process_memory_problems(recipe, cpu_device(), target.processes)
    ):
        raise UserError(problems)
    note = oversubscription_note(target.processes, cpu_cores())
    return replace(recipe, notes=[*recipe.notes, note]) if note else recipe


def _is_finished(recipe: Recipe) -> bool:
    try:
        return RunDirectory.of(recipe, force=False).finished
    except UserError:  # the launch reports it, unless an option allows it
        return False


def process_memory_problems(recipe: Recipe, device: Device, processes: int) -> list[Problem]:
    """Return the problem of a recipe whose processes need more memory than the machine has, [] if they fit.

    Each process has a GPU of its own, and a CPU's memory is shared by all of them. A single process is not
    refused: a plan is an estimate.

    Args:
        recipe: the recipe, with resolved settings.
        device: the device of the processes.
        processes: their number.
    """
    if device.kind != "cpu" or processes == 1:
        return []
    # Of the machine's memory: what is free changes while the processes start.
    device = replace(device, free=None)
    try:
        plan = make_plan(_with_processes(recipe, processes), device, 1)
    except UserError:  # no plan for this base, or invalid rows: the run reports the rows itself
        return []
    if plan.fits:
        return []
    # As in Plan.fits: each process also needs the memory of Python and its libraries.
    each = format_bytes(plan.peak.total + RESERVED_BYTES[device.kind])
    actual = f"{processes} processes need {each} each (llm-align plan); {format_bytes(device.memory)} exist"
    if not (largest := _largest_number(recipe, plan, device, processes)):
        repair = "`llm-align plan` names settings that need less memory"
        return [Problem(KEY, actual, "processes that fit into the machine's memory", repair)]
    return [Problem(KEY, actual, f"at most {largest}", f"{KEY}={largest}")]


def oversubscription_note(processes: int, cores: int) -> str:
    """Return the note on more processes than cores, "" if there are enough."""
    if processes <= cores:
        return ""
    return f"{KEY}={processes} on {cores} CPU core{'s' if cores > 1 else ''}: more processes are not faster"


def _largest_number(recipe: Recipe, plan: Plan, device: Device, processes: int) -> int:
    """Return the largest number of processes that fits and divides the batch; 0 if none does."""
    batch_size = recipe.settings.train.batch_size
    numbers = [number for number in range(min(processes - 1, batch_size), 0, -1) if batch_size % number == 0]
    for number in numbers:
        if make_plan(_with_processes(recipe, number), device, 1, reuse=plan).fits:
            return number
    return 0


def _with_processes(recipe: Recipe, processes: int) -> Recipe:
    train = recipe.settings.train.model_copy(update={"num_processes": processes})
    return replace(recipe, settings=recipe.settings.model_copy(update={"train": train}))
