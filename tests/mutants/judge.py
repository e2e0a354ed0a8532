"""Runs tests on a changed copy of the tree, each time in a fork of a process that has torch loaded."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import numpy
import pytest
import torch
import triton

from mutants.sample import PACKAGE, ROOT

__all__ = ["copy_tree", "log", "run_tests"]
_LOADED = (numpy, torch, triton)  # for the forks
_LOG = "mutant.log"
_MEMORY = 16 << 30  # bytes; a mutant may ask for any number of them


def copy_tree(folder: Path) -> None:
    """The files of the checkout, without what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(tree: Path, tests: list[str], limit: float) -> tuple[str, float, str]:
    """Whether the tests of a tree "passed", "failed" or had no "time"; the seconds; the test that failed.

    The limit is one test's, in seconds: on a slow machine many tests take long, and a mutant that hangs ends none.
    """
    start = ended = time.monotonic()
    written = 0
    (tree / _LOG).unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _become_pytest(tree, tests)
    try:
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            if (size := (tree / _LOG).stat().st_size if (tree / _LOG).exists() else 0) != written:
                written, ended = size, time.monotonic()  # pytest writes a dot per test
            if time.monotonic() - ended > limit:
                status = -1
                break
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # ranks that a test started are of the same group
        if status == -1:
            os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status) if status != -1 else -1
    if code in (3, 4, 5):  # of pytest itself: nothing was tested
        raise RuntimeError(f"expected tests in {tests}, got pytest's exit code {code}:\n{log(tree)}")
    said = [line for line in log(tree).splitlines() if line.startswith(("FAILED", "ERROR"))]
    outcome = "passed" if code == 0 else "time" if status == -1 else "failed"
    return outcome, time.monotonic() - start, said[0].split(" ", 1)[1].split(" - ")[0] if said else ""


def log(tree: Path) -> str:
    """The end of what the last tests printed."""
    return (tree / _LOG).read_text(errors="replace")[-5000:]


def _become_pytest(tree: Path, tests: list[str]) -> None:
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        with (tree / _LOG).open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(path for path in sys.path if not path or Path(path) not in (ROOT, ROOT / "tests"))]
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "mutants"}
        os.environ.setdefault("HYPOTHESIS_MAX_EXAMPLES", "40")
        sys.dont_write_bytecode = True
        assert not any(name == PACKAGE or name.startswith(f"{PACKAGE}.") for name in sys.modules)
        marked = "not timing" if any("::" in test for test in tests) else "not slow and not timing"
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", marked, "--tb=line", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
