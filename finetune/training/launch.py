"""A stage on as many processes as its recipe asks for; the user types no launcher.

The processes are started by torch's elastic agent, the one behind ``torchrun`` and ``accelerate launch``
(Accelerate's own command starts several processes on GPUs alone, and through MPI on CPUs). Each of them runs
the whole stage; under a launcher of the user's (torchrun, accelerate, deepspeed, srun) this process is one
of them already.
"""

import logging
import os
import pickle
import sys
import tempfile
import uuid
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

from accelerate.utils import patch_environment
from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from finetune.planning import choices
from finetune.planning.hardware import detect
from finetune.planning.world import world
from finetune.recipe.discovery import load_stage
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.training.run_directory import RunDirectory
from finetune.training.stops import Interrupted, LostProcessError
from finetune.training.strategies import ZERO

if TYPE_CHECKING:
    from finetune.training.result import Result

GRACE = 600
"""Seconds that the processes have for the step in hand and its checkpoint, after a signal."""
MEETING = "localhost:0"
"""Where they find each other: this machine, any free port."""


@dataclass(frozen=True)
class Work:
    """What each process is told: the recipe to run, and how it was asked for."""

    recipe: Recipe
    force: bool
    command: str


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
    count, _ = choices.processes(recipe.settings.train.processes, detect())
    if count > 1 and not RunDirectory.of(recipe, force=force).finished:
        _start(Work(recipe, force, command), count)
        force = False
    return stage.run(recipe, console, force=force, command=command)  # type: ignore[no-any-return]


def _refuse_without_library(strategy: str) -> None:
    """Raise UserError for ZeRO where DeepSpeed, which carries it out, is not installed."""
    if strategy in ZERO and find_spec("deepspeed") is None:
        repair = "pip install 'llm-align[zero]' (Linux); or train.strategy=ddp"
        raise UserError(Problem("train.strategy", f"{strategy}, without DeepSpeed", "DeepSpeed", repair))


def _start(work: Work, count: int) -> None:
    """Start the processes and wait for them; what one of them raised is raised here."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we tell it in our words
    with tempfile.TemporaryDirectory(prefix="llm-align-") as name:
        folder = Path(name)
        (folder / WORK).write_bytes(pickle.dumps(work))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            logs_specs=DefaultLogsSpecs(log_dir=name),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=MEETING,
            max_restarts=0,
            local_addr="localhost",
            shutdown_timeout=GRACE,
        )
        try:
            cores = max(1, len(os.sched_getaffinity(0)) // count)
            with patch_environment(omp_num_threads=cores, torch_cpp_log_level="ERROR"):
                elastic_launch(config, sys.executable)("-P", "-m", "finetune.training.worker", name)
        except SignalException as stop:
            raise Interrupted(_stopped(folder, stop)) from stop
        except ChildFailedError as error:
            raise _cause(folder, error.failures) from None


WORK = "work.pickle"


def report_file(folder: Path, rank: int) -> Path:
    """Return where a process leaves what it raised, for the one that started it."""
    return folder / f"raised-{rank}.pickle"


def _raised(folder: Path, rank: int) -> Exception | None:
    file = report_file(folder, rank)
    found: Any = pickle.loads(file.read_bytes()) if file.exists() else None  # noqa: S301 - our own file
    return found if isinstance(found, Exception) else None


def _stopped(folder: Path, stop: SignalException) -> str:
    found = _raised(folder, 0)
    told = f"stopped by {Signals(stop.sigval).name}; the same command goes on from the last checkpoint"
    return str(found) if isinstance(found, Interrupted) else told


def _cause(folder: Path, failures: dict[int, ProcessFailure]) -> Exception:
    """Return what ended the run: what a process said of itself, before what the others noticed of it."""
    said = {rank: _raised(folder, rank) for rank in failures}
    for found in said.values():
        if found is not None and not isinstance(found, LostProcessError):
            return found
    killed = {rank: failure for rank, failure in failures.items() if rank not in said or said[rank] is None}
    for rank, failure in killed.items():
        return LostProcessError(f"process {rank} (pid {failure.pid}) {_ending(failure.exitcode)}")
    return next(found for found in said.values() if found is not None)


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with status {exit_code} and said nothing"
    name = Signals(-exit_code).name
    memory = "; the system does that where memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{memory}"
