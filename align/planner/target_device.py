"""The device that a plan is made for: a GPU by name, or this machine."""

from finetune.distributed.hardware import Device, detect_devices, device_by_name
from finetune.distributed.solver import LaunchTarget, resolve
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import TrainSettings
from finetune.training import auto_values


def target_device(train: TrainSettings, gpu: str | None, gpus: int | None) -> tuple[Device, int]:
    """Return a device and how many of it there are.

    Args:
        train: a recipe's training section, whose number of processes is the number of GPUs of a named device.
        gpu: a name, a size, ``cpu``; None: this machine.
        gpus: their number; None: this machine's, or the recipe's.

    Raises:
        UserError: an unknown name, or several CPUs.
    """
    target, available = (device_by_name(gpu), None) if gpu is not None else detect_devices()
    if gpus is not None and gpus > 1 and target.kind == "cpu":
        text = f"{gpus} of {target.name}"
        repair = "train.num_processes=2 runs two processes on the CPU; --gpu h100 plans for another machine"
        raise UserError(Problem("--gpus", text, "1, or a GPU by --gpu", repair))
    processes = train.num_processes if isinstance(train.num_processes, int) else 1
    return target, gpus or available or processes


def resolve_for_device(recipe: Recipe, target: Device, count: int) -> Recipe:
    """Return the recipe with compatible settings for a device, as its run would have them.

    Raises:
        UserError: incompatible settings.
    """
    return resolve(recipe, launch_target(recipe, target, count))


def launch_target(recipe: Recipe, target: Device, count: int) -> LaunchTarget:
    """Return the launch target of a recipe on a device.

    Raises:
        UserError: more processes than GPUs.
    """
    processes, _ = auto_values.num_processes(recipe.settings.train.num_processes, target.hardware(count))
    return LaunchTarget(target.kind, target.bfloat16, processes)
