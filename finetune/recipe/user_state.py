"""Execute a user's Python code without effects on the run: random states, library settings, environment.

What a file changes for itself (working directory, environment variables) is undone after each call and
restored for its next one.
"""

import gc
import importlib
import io
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Getter and setter of one setting of this process."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SEED_BYTES = 4  # numpy's legacy seed has 32 bits


@dataclass
class UserState:
    """What a user's file has changed for its own code.

    Attributes:
        file: the file.
        environment: changed environment variables; None: deleted.
        folder: its working directory; None: that of the run.
    """

    file: Path
    environment: dict[str, str | None] = field(default_factory=dict)
    folder: str | None = None

    def enter(self) -> None:
        """Change environment and working directory to those of the file."""
        _set_environment(self.environment)
        if self.folder is not None:
            os.chdir(self.folder)

    def leave(self, environment: dict[str, str], folder: str) -> None:
        """Remember environment and working directory of the file, and restore those of the run."""
        theirs = dict(os.environ)
        keys = [key for key in {**environment, **theirs} if environment.get(key) != theirs.get(key)]
        self.environment = {key: theirs.get(key) for key in keys}
        _set_environment({key: environment.get(key) for key in keys})
        # None: the run's own folder, which a notebook may change between calls.
        self.folder = current if (current := os.getcwd()) != folder else None
        os.chdir(folder)


@contextmanager
def user_code(state: UserState, *, seed: str | None = None) -> Iterator[None]:
    """Execute a user's code inside the block; afterwards the process is as before.

    Args:
        state: of the code's file.
        seed: text that seeds Python's, numpy's and torch's random numbers, so that a call returns the same in
            a resumed run and on any number of processes; None: not seeded, for an import.
    """
    environment, folder = dict(os.environ), os.getcwd()
    restore = _snapshot()
    # Standard output may be JSON, and a progress bar writes there.
    with redirect_stdout(sys.stderr):
        try:
            _prepare_interpreter(state.file, interactive=seed is not None)
            state.enter()
            if seed is not None:
                _seed_random(seed)
            yield
        finally:
            state.leave(environment, folder)
            restore()


def import_first(modules: set[str]) -> None:
    """Import libraries whose settings a file may change while it imports them."""
    # Their settings are unknown before they are imported.
    for name in sorted(modules & {"numpy", "torch"}):
        importlib.import_module(name)


def _set_environment(values: dict[str, str | None]) -> None:
    for key, value in values.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


def _prepare_interpreter(file: Path, *, interactive: bool) -> None:
    # argparse in the file must not parse the arguments of llm-align.
    sys.argv = [str(file)]
    # Last: a file next to the user's must not replace an installed library.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    # A terminal stays readable in calls, for a debugger.
    if not (interactive and sys.stdin is not None and sys.stdin.isatty()):
        sys.stdin = io.StringIO()


def _snapshot() -> Callable[[], None]:
    """Return a function that restores the state of this process."""
    had_torch = "torch" in sys.modules
    random_state = random.getstate()
    libraries = [*_numpy_random(), *_torch_random()]
    library_states = [get() for get, _ in libraries]
    settings = [*_interpreter_settings(), *_numpy_settings(), *_torch_settings()]
    values = [get() for get, _ in settings]

    def restore() -> None:
        random.setstate(random_state)
        for (_, put), state in zip(libraries, library_states, strict=True):
            put(state)
        for (get, put), value in zip(settings, values, strict=True):
            if get() != value:
                put(value)
        if not had_torch and (torch := sys.modules.get("torch")):
            _reset_torch(torch)

    return restore


def _interpreter_settings() -> list[Setting]:
    root = logging.getLogger()
    settings: list[Setting] = [
        (lambda: (sys.argv, sys.stdin), _set_streams),
        (lambda: list(sys.path), lambda value: sys.path.__setitem__(slice(None), value)),
        (sys.getrecursionlimit, sys.setrecursionlimit),
        (gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
        (lambda: list(warnings.filters), _set_warning_filters),
        (lambda: root.level, root.setLevel),
        (lambda: list(root.handlers), lambda value: root.handlers.__setitem__(slice(None), value)),
        (lambda: root.manager.disable, logging.disable),
    ]
    if threading.current_thread() is threading.main_thread():
        settings += [_signal_setting(number) for number in STOP_SIGNALS]
    return settings


def _signal_setting(number: signal.Signals) -> Setting:
    return (lambda: signal.getsignal(number), lambda handler: signal.signal(number, handler))


def _set_streams(value: Any) -> None:
    sys.argv, sys.stdin = value


def _set_warning_filters(value: list[Any]) -> None:
    # Not an assignment: `resetwarnings` also clears the cache of the filters.
    warnings.resetwarnings()
    warnings.filters.extend(value)  # type: ignore[attr-defined]  # typeshed has a sequence, it is a list


def _numpy_random() -> list[Setting]:
    numpy = sys.modules.get("numpy")
    return [(numpy.random.get_state, numpy.random.set_state)] if numpy else []


def _numpy_settings() -> list[Setting]:
    numpy = sys.modules.get("numpy")
    return [(numpy.geterr, lambda value: numpy.seterr(**value))] if numpy else []


def _torch_random() -> list[Setting]:
    torch = sys.modules.get("torch")
    if not torch:
        return []
    cpu: Setting = (torch.get_rng_state, torch.set_rng_state)
    gpus: Setting = (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    return [cpu, gpus] if torch.cuda.is_initialized() else [cpu]


def _torch_settings() -> list[Setting]:
    torch = sys.modules.get("torch")
    if not torch:
        return []
    return [
        (torch.get_default_dtype, torch.set_default_dtype),
        # None clears the default; "cpu" would keep a mode active around every call.
        (
            torch.get_default_device,
            lambda value: torch.set_default_device(None if value.type == "cpu" else value),
        ),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    ]


def _reset_torch(torch: Any) -> None:
    """Set what a file changed after an indirect import of torch to torch's defaults."""
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


def _seed_random(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    seed = int.from_bytes(blake2b(data, digest_size=SEED_BYTES).digest(), "little")
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        # Not torch.manual_seed, which also queues seeds for a GPU that is not used yet.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
