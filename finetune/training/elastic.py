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

from finetune.recipe.recipe import Recipe
from finetune.training.stops import Interrupted, LostProcessError

GRACE = 600
"""Seconds that the workers have after a signal to finish the current step and write its checkpoint."""
MEETING = "localhost:0"
"""Rendezvous endpoint: this machine, any free port."""
WORK = "work.pickle"


@dataclass(frozen=True)
class Work:
    """The pickled arguments of a worker: recipe and command-line options."""

    recipe: Recipe
    force: bool
    command: str


def start_processes(work: Work, count: int) -> None:
    """Start the workers and wait for them.

    Raises:
        Exception: the one that a worker raised first.
        Interrupted: a signal came.
        LostProcessError: a worker was killed, or ended without an exception.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we report failures ourselves
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
            max_restarts=0,  # the user resumes with the same command
            local_addr="localhost",
            shutdown_timeout=GRACE,
        )
        try:
            # Divide the cores: N processes with one thread per core each would oversubscribe them.
            cores = max(1, len(os.sched_getaffinity(0)) // count)
            with patch_environment(omp_num_threads=cores, torch_cpp_log_level="ERROR"):
                # -P: no module of the current folder may shadow an installed one.
                elastic_launch(config, sys.executable)("-P", "-m", "finetune.training.worker", name)
        except SignalException as stop:
            raise Interrupted(_stopped(folder, stop)) from stop
        except ChildFailedError as error:
            raise _cause(folder, error.failures) from None


def report_file(folder: Path, rank: int) -> Path:
    """Return the file in which a worker pickles its exception for the launcher."""
    return folder / f"raised-{rank}.pickle"


def _raised(folder: Path, rank: int) -> Exception | None:
    file = report_file(folder, rank)
    found: Any = pickle.loads(file.read_bytes()) if file.exists() else None  # noqa: S301 - our own file
    return found if isinstance(found, Exception) else None


def _stopped(folder: Path, stop: SignalException) -> str:
    found = _raised(folder, 0)
    told = f"stopped by {Signals(stop.sigval).name}. Run the same command to resume from the last checkpoint"
    return str(found) if isinstance(found, Interrupted) else told


def _cause(folder: Path, failures: dict[int, ProcessFailure]) -> Exception:
    """Return the root cause: a worker's own exception before the ranks that were killed or lost a peer."""
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
        return f"exited with status {exit_code} and no error message"
    name = Signals(-exit_code).name
    memory = "; the kernel's out-of-memory killer does that" if name == "SIGKILL" else ""
    return f"was killed by {name}{memory}"
