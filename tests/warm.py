"""Processes that begin at once: ``subprocess.Popen`` and ``run`` for ``python -m MODULE WORDS``.

They are forked from a server that has imported everything (``warm_server.py``), one for each process of
pytest's. Pids, signals, exit statuses, output and environment are those of any process; what is not: they
are the server's children, and share its hash seed. So runs that killed ones are compared with are runs of
pytest's own process, whose hash seed is another one (``killed.uninterrupted``), and ``forks=False`` leaves a
run's own processes its children, which have to end with it.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("warm_server.py")
LONGEST = 1 << 17
"""Bytes of a message at most: an environment, most of all."""


@cache
def server() -> str:
    """Start the server of this process, at its first use, and return its address."""
    folder = tempfile.mkdtemp(prefix="warm-")
    path = f"{folder}/socket"
    started = subprocess.Popen(
        [sys.executable, str(SERVER), path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert started.stdin and started.stdout
    atexit.register(started.communicate)  # it ends with its standard input
    assert started.stdout.readline() == b"ready\n", "the warm server did not start"
    return path


class Popen:
    """A process, with those of ``subprocess.Popen``'s words that the tests use."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: Any = None,
        stderr: Any = None,
        text: bool = False,
        start_new_session: bool = True,
        forks: bool = True,
    ) -> None:
        """Start it; where ``forks``, the processes of its run begin at once too, and are not its children."""
        self.args, self.text, self.returncode = args, text, None
        self.output, self.errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        self.piped = stdout == subprocess.PIPE, stderr == subprocess.PIPE
        out = self._file(stdout, 1)
        files = [out, out if stderr == subprocess.STDOUT else self._file(stderr, 2)]
        python, *words = args
        assert python == sys.executable, args
        request = {"words": words, "folder": str(cwd or Path.cwd()), "forks": forks}
        request["environment"] = dict(env or os.environ)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(server())
        socket.send_fds(self._server, [json.dumps(request).encode()], files)
        self.pid = int(self._server.recv(LONGEST))

    def _file(self, asked: Any, number: int) -> int:
        if asked is None:
            return number
        if asked == subprocess.DEVNULL:
            return _nothing()
        if asked == subprocess.PIPE:
            return (self.output, self.errors)[number - 1].fileno()
        return asked if isinstance(asked, int) else asked.fileno()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                status = self._server.recv(LONGEST)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.returncode = int(status)
            self._server.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Wait, and return what was piped of output and errors."""
        self.wait(timeout)
        told = []
        for file, piped in zip((self.output, self.errors), self.piped, strict=True):
            file.seek(0)
            content: Any = file.read()
            file.close()
            told.append((content.decode() if self.text else content) if piped else None)
        return told[0], told[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)


@cache
def _nothing() -> int:
    return os.open(os.devnull, os.O_RDWR)


def run(
    args: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    capture_output: bool = False,
    text: bool = False,
    timeout: float | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[Any]:
    """Do what ``subprocess.run`` does."""
    piped = subprocess.PIPE if capture_output else None
    process = Popen(args, cwd=cwd, env=env, stdout=piped, stderr=piped, text=text)
    try:
        told = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    ended = subprocess.CompletedProcess(args, process.wait(), *told)
    if check:
        ended.check_returncode()
    return ended
