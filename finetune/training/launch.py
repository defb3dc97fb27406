"""Run a stage on the recipe's number of processes, without torchrun or `accelerate launch`.

Every process runs the complete stage. Under the user's own launcher (torchrun, accelerate, deepspeed, srun)
this process is one of them already. Without one, torch's elastic agent (torchrun's) starts the workers, each
``python -m finetune.training.launch FOLDER``, and the error that a worker raised first is raised here;
``accelerate launch`` would need MPI to start several processes on CPUs. Heavy imports wait until a run needs
them, so a finished run returns at once.
"""

import logging
import os
import pickle
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

from rich.console import Console

from finetune.distributed.deepspeed_setup import check_deepspeed_installed, check_extension_builds
from finetune.distributed.hardware import detect_hardware
from finetune.distributed.interrupts import Interrupted, LostProcessError, NotFiniteError
from finetune.distributed.rank import dist_info
from finetune.recipe.console import Terminal
from finetune.recipe.disk import writing
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.hub import check_hub
from finetune.recipe.python_function import python_functions
from finetune.recipe.recipe import Recipe
from finetune.recipe.silence import silence_libraries
from finetune.recipe.terminal import prepare_terminal
from finetune.training import auto_values
from finetune.training.result import Callbacks, Result, RunOptions
from finetune.training.run_directory import RunDirectory
from finetune.training.stage import run_stage

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


SHUTDOWN_TIMEOUT = 600
"""Seconds that the workers have after a signal to finish the current step and write its checkpoint."""
RENDEZVOUS_ENDPOINT = "localhost:0"
"""Rendezvous endpoint: this machine, any free port."""
SPEC_FILE = "work.pickle"


def launch_stage(
    recipe: Recipe,
    console: Console,
    *,
    force: bool = False,
    accept_changed_code: bool = False,
    command: str = "",
    callbacks: Callbacks = (),
    finish: bool = False,
) -> Result:
    """Run a recipe's stage, on several processes if the recipe says so, and return its result.

    Args:
        recipe: the recipe; its parent run and its reward models are finished runs.
        console: receives progress output.
        force: replace an existing run of this recipe.
        accept_changed_code: resume an interrupted run although files of its user functions have changed.
        command: the command line, for run.json.
        callbacks: the user's callbacks of the trainer.
        finish: end the run at its last checkpoint, without a further step.

    Raises:
        UserError: the recipe or the data are invalid; nothing was written.
        Interrupted: a signal came; a checkpoint was saved.
        NotFiniteError: loss or gradient became NaN or infinite.
        LostProcessError: a process died.
    """
    check_deepspeed_installed(recipe.settings.train.strategy)
    check_extension_builds(recipe.settings.train.strategy)
    options: RunOptions = {
        "accept_changed_code": accept_changed_code,
        "command": command,
        "callbacks": callbacks,
        "finish": finish,
    }
    dist = dist_info()
    if dist.world_size > 1:
        rank_console = console if dist.is_main else Terminal(quiet=True)
        return run_stage(recipe, rank_console, force=force, **options)
    if not RunDirectory.of(recipe, force=force, accept_changed_code=accept_changed_code).finished:
        check_hub(recipe.settings)
        num_processes, _ = auto_values.num_processes(recipe.settings.train.num_processes, detect_hardware())
        if num_processes > 1:
            _refuse_python_objects(recipe, callbacks, num_processes)
            launch_processes(LaunchSpec(recipe, force, accept_changed_code, command, finish), num_processes)
            force = False  # the workers finished the run: below it is only read
    return run_stage(recipe, console, force=force, **options)


def _refuse_python_objects(recipe: Recipe, callbacks: Callbacks, num_processes: int) -> None:
    """Raise UserError for functions and callbacks given in Python, which other processes cannot get."""
    if callbacks:
        expected = "1 for callbacks given in Python"
        repair = "train.num_processes=1; or start the program with torchrun"
        raise UserError(Problem("train.num_processes", f"{num_processes}, with callbacks", expected, repair))
    if function := next(python_functions(recipe.settings), None):
        actual = f"{num_processes}, with the function {function.name} given in Python"
        repair = f"put it into a file and name it rules.py:{function.name}; or train.num_processes=1"
        raise UserError(Problem("train.num_processes", actual, "1 for functions given in Python", repair))


@dataclass(frozen=True)
class LaunchSpec:
    """The pickled arguments of a worker: recipe and command-line options."""

    recipe: Recipe
    force: bool
    accept_changed_code: bool
    command: str
    finish: bool


def launch_processes(spec: LaunchSpec, num_processes: int) -> None:
    """Start the workers and wait for them.

    Raises:
        Exception: the one that a worker raised first.
        Interrupted: a signal came.
        LostProcessError: a worker was killed, or ended without an exception.
    """
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we report failures ourselves
    with tempfile.TemporaryDirectory(prefix="llm-align-") as folder_name:
        folder = Path(folder_name)
        with writing(folder):
            (folder / SPEC_FILE).write_bytes(pickle.dumps(spec))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            # The agent's default is a temporary folder that nobody removes.
            logs_specs=DefaultLogsSpecs(log_dir=folder_name),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=RENDEZVOUS_ENDPOINT,
            max_restarts=0,  # the user resumes with the same command
            local_addr="localhost",
            shutdown_timeout=SHUTDOWN_TIMEOUT,
        )
        try:
            # Divide the cores: N processes with one thread per core each would oversubscribe them.
            threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
            with patch_environment(omp_num_threads=threads, torch_cpp_log_level="ERROR"):
                # -P: no module of the current folder may shadow an installed one.
                elastic_launch(config, sys.executable)("-P", "-m", "finetune.training.launch", folder_name)
        except SignalException as stop:
            raise Interrupted(_interrupt_message(folder, stop)) from stop
        except ChildFailedError as error:
            # `from None`: the agent's traceback says nothing about the worker's error.
            raise _root_cause(folder, error.failures) from None


def error_file(folder: Path, rank: int) -> Path:
    """Return the file in which a worker pickles its exception for the launcher."""
    return folder / f"raised-{rank}.pickle"


def _load_error(folder: Path, rank: int) -> Exception | None:
    file = error_file(folder, rank)
    error: Any = pickle.loads(file.read_bytes()) if file.exists() else None  # noqa: S301 - our own file
    return error if isinstance(error, Exception) else None


def _interrupt_message(folder: Path, stop: "SignalException") -> str:
    error = _load_error(folder, 0)
    default = (
        f"stopped by {Signals(stop.sigval).name}. Run the same command to resume from the last checkpoint"
    )
    return str(error) if isinstance(error, Interrupted) else default


def _root_cause(folder: Path, failures: dict[int, "ProcessFailure"]) -> Exception:
    """Return the root cause: a worker's own exception before the ranks that were killed or lost a peer."""
    # When one rank fails, the agent kills the others, and their collectives fail too: those are consequences.
    errors = {rank: _load_error(folder, rank) for rank in failures}
    for error in errors.values():
        if error is not None and not isinstance(error, LostProcessError):
            return error
    silent = {
        rank: failure for rank, failure in failures.items() if rank not in errors or errors[rank] is None
    }
    for rank, failure in silent.items():
        return LostProcessError(f"process {rank} (pid {failure.pid}) {_describe_exit(failure.exitcode)}")
    return next(error for error in errors.values() if error is not None)


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with status {exit_code} and no error message"
    # As in subprocess, a negative exit code is the number of the signal.
    name = Signals(-exit_code).name
    out_of_memory = "; the kernel's out-of-memory killer does that" if name == "SIGKILL" else ""
    return f"was killed by {name}{out_of_memory}"


def run_worker(folder: Path) -> int:
    """Run the stage of the launch spec in ``folder``; pickle an exception there for the launcher.

    Returns:
        The exit status: 0, or 1 after a user error, a signal or a NaN.
    """
    _exit_with_parent()
    dist = dist_info()
    spec = pickle.loads((folder / SPEC_FILE).read_bytes())
    error_path = error_file(folder, dist.rank)
    try:
        launch_stage(
            spec.recipe,
            Terminal(),
            force=spec.force,
            accept_changed_code=spec.accept_changed_code,
            command=spec.command,
            finish=spec.finish,
        )
    except (UserError, Interrupted, NotFiniteError) as user_error:
        error_path.write_bytes(pickle.dumps(user_error))
        return 1
    except Exception as error:  # may not be picklable: send its text; the traceback is printed here
        lost_process = LostProcessError(f"process {dist.rank}: {type(error).__name__}: {error}")
        error_path.write_bytes(pickle.dumps(lost_process))
        raise
    return 0


def _exit_with_parent() -> None:
    """Exit when the launcher is gone: after SIGKILL it could not stop its workers."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    prepare_terminal()
    silence_libraries()  # before the stage's imports, which is when the libraries warn
    status = run_worker(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are written. Library threads that still run would sometimes abort the interpreter's shutdown.
    os._exit(status)
