"""Entry point of one worker process, started by the launcher (``python -m finetune.training.worker``)."""

import os
import pickle
import sys
import threading
import time
from pathlib import Path

from finetune.recipe.silence import silence_libraries

# Before the imports below, which is when the libraries warn.
silence_libraries()

from rich.console import Console  # noqa: E402

from finetune.distributed.interrupts import Interrupted, LostProcessError, NotFiniteError  # noqa: E402
from finetune.distributed.launcher import SPEC_FILE, error_file  # noqa: E402
from finetune.distributed.rank import dist_info  # noqa: E402
from finetune.recipe.errors import UserError  # noqa: E402
from finetune.training.launch import launch_stage  # noqa: E402


def main(folder: Path) -> int:
    """Run the stage of the launch spec in ``folder``; pickle an exception there for the launcher.

    Returns:
        The exit status: 0, or 1 after a user error, a signal or a NaN.
    """
    _exit_with_parent()
    dist = dist_info()
    spec = pickle.loads((folder / SPEC_FILE).read_bytes())
    error_path = error_file(folder, dist.rank)
    try:
        launch_stage(spec.recipe, Console(), force=spec.force, command=spec.command)
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
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are written. Library threads that still run would sometimes abort the interpreter's shutdown.
    os._exit(status)
