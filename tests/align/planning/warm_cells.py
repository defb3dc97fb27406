"""Fork server for cells: each runs in processes forked from this one, which has imported everything.

``python warm_cells.py WORLD OUT`` reads one cell per line as JSON and answers each with a line of JSON. The
processes get the environment variables of torchrun.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from cells import World, name_of, recipe_text
from rich.console import Console

from align.start import ready
from finetune.planning.solver import Combination
from finetune.recipe.errors import UserError
from finetune.recipe.quiet import quiet
from finetune.recipe.recipe import load
from finetune.training.launch import run_stage

SECONDS = 180
SHOWN = 3000


def main(world: World, out: Path) -> None:
    """Run the cells on stdin."""
    quiet()
    for line in sys.stdin:
        cell = Combination(**json.loads(line))
        status, said = run(cell, world, out / name_of(cell))
        print(json.dumps({"cell": asdict(cell), "status": status, "said": said}), flush=True)


def run(cell: Combination, world: World, out: Path) -> tuple[int, str]:
    """Return the first nonzero exit status of a cell's processes, and their output."""
    out.with_suffix(".yaml").write_text(recipe_text(cell, world), encoding="utf-8")
    port = free_port()
    logs = [out.with_suffix(f".{rank}.log") for rank in range(cell.processes)]
    processes = [started(cell, out, rank=rank, port=port, log=log) for rank, log in enumerate(logs)]
    found = waited_for(processes)
    said = "\n".join(log.read_text(encoding="utf-8", errors="replace")[-SHOWN:] for log in logs)
    return next((status for status in found if status > 0), next((s for s in found if s), 0)), said


def waited_for(processes: list[int]) -> list[int]:
    """Return exit statuses; after a failure or timeout the other processes are killed."""
    found: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while len(found) < len(processes):
        for process in set(processes) - set(found):
            gone, status = os.waitpid(process, os.WNOHANG)
            if gone:
                found[process] = os.waitstatus_to_exitcode(status)
        if any(found.values()):
            end = min(end, time.monotonic() + 3)
        if time.monotonic() > end:
            for process in set(processes) - set(found):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                found[process] = -signal.SIGKILL
        time.sleep(0.02)
    return [found[process] for process in processes]


def started(cell: Combination, out: Path, *, rank: int, port: int, log: Path) -> int:
    """Fork a process of a cell and return its PID."""
    if process := os.fork():
        return process
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": cell.processes, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    status = 1
    try:
        recipe = ready(load(cell.stage, str(out.with_suffix(".yaml")), out=out), Console())
        run_stage(recipe, Console(), command="a test")
        status = 0
    except UserError:
        traceback.print_exc()
        status = 2
    except Exception:  # whatever it is, the parent reports it
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


if __name__ == "__main__":
    main(World(Path(sys.argv[1])), Path(sys.argv[2]))
