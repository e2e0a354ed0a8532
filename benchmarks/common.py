"""What every benchmark shares: the machine and versions it names, the one shape of its results, the refusal.

{"benchmark": "cpu", "command": "...", "date": "...", "revision": "...", "machine": {...}, "versions": {...},
 "check": "...", "rows": [{"case": ..., ...}, ...]}
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("benchmark", "command", "date", "revision", "machine", "versions", "check", "rows")


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def machine() -> dict[str, Any]:
    """Processor and graphics cards."""
    import torch

    found: dict[str, Any] = {"processor": processor(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
    return found


def versions() -> dict[str, Any]:
    """Python, torch, and what torch brings."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    if torch.cuda.is_available():
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def revision() -> str:
    """The commit that ran, with `+` where the tree had changes; "unknown" outside a git checkout."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+" if changes.strip() else "")


def announce() -> None:
    """Prints machine and versions."""
    for values in (machine(), versions()):
        print(", ".join(f"{name} {value}" for name, value in values.items()), flush=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that all ranks of a launch on one machine see, and that rank 0 removes."""
    folder = Path(tempfile.gettempdir()) / f"benchmark-{os.environ.get('MASTER_PORT', os.getpid())}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder)


def refuse(failures: Iterable[str]) -> None:
    """Ends the run, without a number, where a check failed."""
    if found := list(failures):
        sys.exit("wrong results, so nothing is timed:\n  " + "\n  ".join(found))


def result(benchmark: str, rows: list[dict[str, Any]], check: str) -> dict[str, Any]:
    """A run's result in the one shape."""
    ranks = os.environ.get("WORLD_SIZE")
    launcher = ["torchrun", "--standalone", "--nproc-per-node", ranks] if ranks else ["python"]
    return {
        "benchmark": benchmark,
        "command": shlex.join([*launcher, f"benchmarks/{benchmark}.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "revision": revision(),
        "machine": machine(),
        "versions": versions(),
        "check": check,
        "rows": rows,
    }


def write(folder: Path | None, benchmark: str, rows: list[dict[str, Any]], *, check: str) -> Path | None:
    """Writes `{benchmark}_{device}.json` into a folder, if one was asked for.

    Args:
        folder: where to, made if need be; None writes nothing.
        benchmark: its name.
        rows: the measurements, one dict a line of the table, each with its `case`.
        check: what was compared with what before anything was timed, in words.

    Returns:
        The file.
    """
    if folder is None:
        return None
    outcome = result(benchmark, rows, check)
    folder.mkdir(parents=True, exist_ok=True)
    device = outcome["machine"].get("gpu", outcome["machine"]["processor"])
    path = folder / f"{benchmark}_{re.sub(r'[^A-Za-z0-9]+', '_', device).strip('_')}.json"
    path.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path


def problems(outcome: Mapping[str, Any]) -> list[str]:
    """What keeps a file from being a result in the one shape, in words."""
    found = [f"no {key!r}" for key in KEYS if key not in outcome] + [
        f"unknown key {key!r}" for key in outcome if key not in KEYS
    ]
    rows = outcome.get("rows", [])
    if not rows or not all(isinstance(row, dict) and "case" in row for row in rows):
        found.append("expected rows, each with its 'case'")
    return found


def redraw(path: Path, benchmark: str, picture: Callable[[dict[str, Any]], Any]) -> Path:
    """Draws the chart beside a benchmark's result; no GPU is needed."""
    outcome = json.loads(path.read_text(encoding="utf-8"))
    if outcome.get("benchmark") != benchmark:
        sys.exit(f"expected a result of benchmarks/{benchmark}.py, got one of {outcome.get('benchmark')!r}: {path}")
    picture(outcome).savefig(path.with_suffix(".png"), dpi=150)
    return path.with_suffix(".png")
