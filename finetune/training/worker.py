"""Entry point of one worker process, started by the launcher (``python -m finetune.training.worker``)."""

import os
import pickle
import sys
import threading
import time
from pathlib import Path

from finetune.recipe.quiet import quiet

quiet()

from rich.console import Console  # noqa: E402

from finetune.planning.world import world  # noqa: E402
from finetune.recipe.errors import UserError  # noqa: E402
from finetune.training.elastic import WORK, report_file  # noqa: E402
from finetune.training.launch import run_stage  # noqa: E402
from finetune.training.stops import Interrupted, LostProcessError, NotFiniteError  # noqa: E402


def main(folder: Path) -> int:
    """Run the stage of the launch spec in ``folder``; pickle an exception there for the launcher.

    Returns:
        The exit status: 0, or 1 after a user error, a signal or a NaN.
    """
    _end_with_parent()
    place = world()
    work = pickle.loads((folder / WORK).read_bytes())
    report = report_file(folder, place.rank)
    try:
        run_stage(work.recipe, Console(), force=work.force, command=work.command)
    except (UserError, Interrupted, NotFiniteError) as told:
        report.write_bytes(pickle.dumps(told))
        return 1
    except Exception as error:  # may not be picklable: send its text; the traceback is printed here
        cause = LostProcessError(f"process {place.rank}: {type(error).__name__}: {error}")
        report.write_bytes(pickle.dumps(cause))
        raise
    return 0


def _end_with_parent() -> None:
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
