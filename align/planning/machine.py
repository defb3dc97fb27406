"""The device that a plan is made for: a GPU by name, or this machine."""

from finetune.planning import choices
from finetune.planning.devices import Device, device, this_machine
from finetune.planning.hardware import Hardware
from finetune.planning.solver import Machine, settled
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import TrainSettings


def machine(train: TrainSettings, gpu: str | None, gpus: int | None) -> tuple[Device, int]:
    """Return a device and how many of it there are.

    Args:
        train: a recipe's training section, whose number of processes is the number of GPUs of a named device.
        gpu: a name, a size, ``cpu``; None: this machine.
        gpus: their number; None: this machine's, or the recipe's.

    Raises:
        UserError: an unknown name, or several CPUs.
    """
    found, here = (device(gpu), None) if gpu is not None else this_machine()
    if gpus is not None and gpus > 1 and found.kind == "cpu":
        text = f"{gpus} of {found.name}"
        repair = "train.processes=2 runs two processes on the CPU; --gpu h100 plans for another machine"
        raise UserError(Problem("--gpus", text, "1, or a GPU by --gpu", repair))
    asked = train.processes if isinstance(train.processes, int) else 1
    return found, gpus or here or asked


def together(recipe: Recipe, found: Device, count: int) -> Recipe:
    """Return the recipe with compatible settings for a device, as its run would have them.

    Raises:
        UserError: incompatible settings.
    """
    return settled(recipe, started_on(recipe, found, count))


def started_on(recipe: Recipe, found: Device, count: int) -> Machine:
    """Return the launch target of a recipe on a device.

    Raises:
        UserError: more processes than GPUs.
    """
    hardware = Hardware(found.kind, found.name, found.bfloat16, count)
    processes, _ = choices.processes(recipe.settings.train.processes, hardware)
    return Machine(found.kind, found.bfloat16, processes)
