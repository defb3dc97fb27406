"""Checks before DeepSpeed starts: it is installed, and no killed build blocks its extensions.

DeepSpeed compiles its extensions when a process first needs them. torch makes the file ``lock`` in the
build's folder, and a second process waits until it is gone. A build that is killed leaves it, and every later
process would wait silently and for ever.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from finetune.distributed.strategies import ZERO_STAGES
from finetune.recipe.errors import Problem, UserError

LOCK_NAME, BUILD_FILE = "lock", "build.ninja"
"""Files of a build's folder (torch 2.13, ``utils/cpp_extension.py``, ``utils/file_baton.py``)."""
PROCESSES = Path("/proc")


def check_deepspeed_installed(strategy: str) -> None:
    """Raise UserError for ZeRO without DeepSpeed installed."""
    if strategy in ZERO_STAGES and find_spec("deepspeed") is None:
        repair = "pip install 'llm-align[zero]' (Linux); or train.strategy=ddp"
        raise UserError(Problem("train.strategy", f"{strategy}, without DeepSpeed", "DeepSpeed", repair))


def check_extension_builds(strategy: str) -> None:
    """Raise UserError for ZeRO if a killed build of DeepSpeed's extensions left its lock."""
    if strategy not in ZERO_STAGES:
        return
    from finetune.library_internals import torch_extensions_folder  # noqa: PLC0415 - imports torch

    if locks := stale_locks(torch_extensions_folder()):
        expected = "a finished build of DeepSpeed's extensions, or a running one"
        raise UserError([_lock_problem(lock, expected) for lock in locks])


def _lock_problem(lock: Path, expected: str) -> Problem:
    actual = (
        f"a build of '{lock.parent.name}' was killed and left its lock: DeepSpeed would wait for it for ever"
    )
    repair = f"rm '{lock}' (unless another machine or container is building there)"
    return Problem(str(lock), actual, expected, repair)


def stale_locks(folder: Path) -> list[Path]:
    """Return the locks of DeepSpeed's builds in torch's extension folder that no process holds.

    Where processes cannot be inspected, none is returned.
    """
    locks = [lock for lock in sorted(folder.glob(f"*/{LOCK_NAME}")) if _may_be_deepspeed_s(lock)]
    if not locks or not PROCESSES.is_dir():
        return []
    held = set(_open_files(LOCK_NAME))
    # Looked up again: a build that ends removes its lock after it has closed it.
    return [lock for lock in locks if os.path.realpath(lock) not in held and lock.exists()]


def _may_be_deepspeed_s(lock: Path) -> bool:
    """Return whether a lock is the user's own, and its build one of DeepSpeed's (or not described yet)."""
    build = lock.with_name(BUILD_FILE)
    # Processes of other users hide their open files.
    is_own = lock.stat().st_uid == os.getuid()
    return is_own and (not build.is_file() or "deepspeed" in build.read_text(encoding="utf-8"))


def _open_files(name: str) -> Iterator[str]:
    """Yield the files of a name that processes of this machine hold open."""
    for link in PROCESSES.glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:  # the process ended, or is another user's
            continue
        if target.endswith(f"/{name}"):
            yield target
