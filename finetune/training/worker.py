"""One of a run's processes, started by ``finetune.training.launch``."""

import os
import pickle
import sys
import threading
import time
import traceback
from pathlib import Path

from finetune.recipe.quiet import quiet

quiet()

from rich.console import Console  # noqa: E402

from finetune.planning.world import world  # noqa: E402
from finetune.recipe.errors import UserError  # noqa: E402
from finetune.training.launch import WORK, report_file, run_stage  # noqa: E402
from finetune.training.stops import Interrupted, LostProcessError, NotFiniteError  # noqa: E402


def main(folder: Path) -> int:
    """Run the stage that ``folder`` tells of, and leave there what it raised.

    Returns:
        The process's exit status: 0, or 1 where something was raised.
    """
    _end_with_parent()
    place = world()
    work = pickle.loads((folder / WORK).read_bytes())
    try:
        run_stage(work.recipe, Console(), force=work.force, command=work.command)
    except (UserError, Interrupted, NotFiniteError) as known:
        told: Exception = known
    except Exception as error:  # told by rank and cause, with the traceback above it
        traceback.print_exc()
        told = LostProcessError(f"process {place.rank}: {type(error).__name__}: {error}")
    else:
        return 0
    report_file(folder, place.rank).write_bytes(pickle.dumps(told))
    return 1


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, killed so that it could not say so."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
