"""Launch a run's worker processes with torch's elastic agent (torchrun's), and re-raise their errors.

``accelerate launch`` would need MPI to start several processes on CPUs.
"""

import logging
import os
import pickle
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from finetune.distributed.interrupts import Interrupted, LostProcessError
from finetune.recipe.recipe import Recipe

SHUTDOWN_TIMEOUT = 600
"""Seconds that the workers have after a signal to finish the current step and write its checkpoint."""
RENDEZVOUS_ENDPOINT = "localhost:0"
"""Rendezvous endpoint: this machine, any free port."""
SPEC_FILE = "work.pickle"


@dataclass(frozen=True)
class LaunchSpec:
    """The pickled arguments of a worker: recipe and command-line options."""

    recipe: Recipe
    force: bool
    command: str


def launch_processes(spec: LaunchSpec, num_processes: int) -> None:
    """Start the workers and wait for them.

    Raises:
        Exception: the one that a worker raised first.
        Interrupted: a signal came.
        LostProcessError: a worker was killed, or ended without an exception.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we report failures ourselves
    with tempfile.TemporaryDirectory(prefix="llm-align-") as folder_name:
        folder = Path(folder_name)
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
                elastic_launch(config, sys.executable)("-P", "-m", "finetune.training.worker", folder_name)
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


def _interrupt_message(folder: Path, stop: SignalException) -> str:
    error = _load_error(folder, 0)
    default = (
        f"stopped by {Signals(stop.sigval).name}. Run the same command to resume from the last checkpoint"
    )
    return str(error) if isinstance(error, Interrupted) else default


def _root_cause(folder: Path, failures: dict[int, ProcessFailure]) -> Exception:
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
