"""A process that has imported everything and forks: ``python warm_server.py SOCKET``; see ``warm.py``.

Each child is what ``python -m MODULE WORDS`` would be: its own pid and session, its client's environment,
folder, stdout and stderr, and the interpreter's own end. Only the imports are there already.
"""

import gc
import json
import os
import pkgutil
import random
import runpy
import selectors
import shutil
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import torch
import warm
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

LAZY = ("trl", "deepspeed", "bitsandbytes", "datasets", "matplotlib.backends.backend_svg")
"""What a run imports late, beside the project's own modules."""
MAINS = ("align.__main__",)
"""What is only ever run by its name."""
LAUNCH = "finetune.training.launch"
"""What is imported, and run by its name too."""
Request = dict[str, Any]


def import_everything() -> None:
    """Import the project, and the libraries that it imports late."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed says that it found no GPU
    from finetune.recipe.silence import silence_libraries

    silence_libraries()
    for name in ("data_templates", "finetune", "align"):
        for module in pkgutil.walk_packages(import_module(name).__path__, f"{name}."):
            if module.name not in MAINS:
                import_module(module.name)
    for name in LAZY:
        import_module(name)


def serve(path: str) -> Request:
    """Fork a process for each request; return in each of those, and never in the server."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(path)
    listening.listen(64)
    here = selectors.PollSelector()  # a child closes it without touching its parent's
    here.register(listening, selectors.EVENT_READ, "request")
    here.register(0, selectors.EVENT_READ, "end")
    print("ready", flush=True)
    while True:
        for key, _ in here.select():
            if key.data == "end":  # the tests are over
                for other in here.get_map().values():
                    if isinstance(other.data, tuple):
                        os.kill(other.data[0], signal.SIGKILL)
                shutil.rmtree(Path(path).parent)
                os._exit(0)
            elif key.data == "request":
                client = listening.accept()[0]
                request, files = read(client)
                if (pid := os.fork()) == 0:
                    close_all(here, client)
                    become(request, files)
                    return request
                for file in files:
                    os.close(file)
                client.sendall(str(pid).encode())
                here.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))
            else:
                end(here, key)


def read(client: socket.socket) -> tuple[Request, list[int]]:
    """Return a request, and the files that are to be its process's standard output and error."""
    content, files, _, _ = socket.recv_fds(client, warm.LONGEST, 2)
    return json.loads(content), files


def end(here: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """Tell a client how its process ended."""
    pid, client = key.data
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    here.unregister(key.fileobj)
    os.close(key.fd)
    try:
        client.sendall(str(status).encode())
    except BrokenPipeError:
        print(f"nobody waits for {pid}", file=sys.stderr)
    client.close()


def close_all(here: selectors.BaseSelector, client: socket.socket) -> None:
    """Close what is the server's."""
    for key in list(here.get_map().values()):
        if key.data == "request":
            key.fileobj.close()
        elif key.data != "end":
            os.close(key.fd)
            key.data[1].close()
    client.close()


def become(request: Request, files: list[int]) -> None:
    """Make this process the one that was asked for."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, *files)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()  # nobody may count on what a parent has drawn: a new interpreter draws by chance
    numpy.random.seed()
    if request["forks"]:
        subprocess_handler.Popen = warm.Popen
    if threads := os.environ.get("OMP_NUM_THREADS"):  # the library has read the server's
        torch.set_num_threads(int(threads))


def run(words: list[str]) -> None:
    """Do what the interpreter does with ``[-P] -m MODULE WORDS``."""
    if words[0] == "-P":
        sys.path.pop(0)
        words = words[1:]
    else:
        sys.path[0] = os.getcwd()
    assert words[0] == "-m", words
    sys.argv = words[1:]
    if words[1] == LAUNCH:  # as in a new process: runpy warns of a module that is there
        del sys.modules[LAUNCH]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[0] = str(Path(__file__).parents[1])
    path = sys.argv[1]
    import_everything()
    warm.server = lambda: path
    gc.collect()
    gc.freeze()
    run(serve(path)["words"])
