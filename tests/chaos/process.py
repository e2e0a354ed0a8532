"""Real processes that start at once: forks of this one, which has the library loaded and has computed nothing."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """What became of a process: its exit code, negative for a signal, and what it said."""

    code: int
    out: bytes
    err: str


class Process:
    """A fork that runs a function and exits as a command would; ranks of one world are several of them."""

    def __init__(
        self,
        log: Path,
        work: Callable[[], object],
        *,
        env: dict[str, str] | None = None,
        file_limit: int = 0,
        stdout: str = "",
    ) -> None:
        self._log, self._code = log, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, env or {}, file_limit, stdout)

    def _run(self, work: Callable[[], object], env: dict[str, str], file_limit: int, stdout: str) -> None:
        code = 70
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            for descriptor, path in ((1, stdout or f"{self._log}.out"), (2, f"{self._log}.err")):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            os.environ |= env
            faulthandler.register(signal.SIGUSR1)
            if file_limit:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
            try:
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def send(self, number: int) -> None:
        """A signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def end(self, limit: float = 120.0) -> Ended:
        """Waits until it has ended; after the limit it is killed, and that is its code."""
        stop = time.monotonic() + limit
        while self.poll() is None:
            if time.monotonic() > stop:
                self.send(signal.SIGUSR1)  # where it hangs is part of what it said
                time.sleep(1.0)
                self.send(signal.SIGKILL)
            time.sleep(0.005)
        out, err = (Path(f"{self._log}.{name}") for name in ("out", "err"))
        said = out.read_bytes() if out.exists() else b""
        return Ended(self.poll() or 0, said, err.read_text(errors="replace") if err.exists() else "")


def world(size: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank of a world."""
    if size == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


@contextlib.contextmanager
def torchrun(log: Path, module: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher itself with two ranks, in a process group of its own that ends with the context."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    with Path(f"{log}.err").open("wb") as err:
        launcher = subprocess.Popen([*command, *arguments], env=env, stdout=err, stderr=err, start_new_session=True)
    try:
        yield launcher
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
