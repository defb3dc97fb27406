"""The machine that is planned for: the one that is named, or this one."""

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
        train: a recipe's training section: the processes that it asks for are GPUs of a named machine.
        gpu: a name, a size, ``cpu``; None: this machine.
        gpus: how many; None: this machine's, or as many as the recipe asks for.

    Raises:
        UserError: an unknown name, or several CPUs.
    """
    found, here = (device(gpu), None) if gpu is not None else this_machine()
    if gpus is not None and gpus > 1 and found.kind == "cpu":
        text = f"{gpus} of {found.name}"
        repair = "train.processes=2 shares one CPU; --gpu h100 names the GPUs of another machine"
        raise UserError(Problem("--gpus", text, "1, or a GPU by --gpu", repair))
    asked = train.processes if isinstance(train.processes, int) else 1
    return found, gpus or here or asked


def together(recipe: Recipe, found: Device, count: int) -> Recipe:
    """Return the recipe with settings that go together on a machine, as its run would have them.

    Raises:
        UserError: what is asked for does not go together.
    """
    return settled(recipe, started_on(recipe, found, count))


def started_on(recipe: Recipe, found: Device, count: int) -> Machine:
    """Return a machine with the processes that a recipe asks for on it.

    Raises:
        UserError: more processes than GPUs.
    """
    hardware = Hardware(found.kind, found.name, found.bfloat16, count)
    processes, _ = choices.processes(recipe.settings.train.processes, hardware)
    return Machine(found.kind, found.bfloat16, processes)
