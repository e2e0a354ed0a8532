"""Damaged files, full disks and two runs in one folder: what a command says, and what it leaves."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from chaos.damages import MENDED, NAMED, Damage
from chaos.kills import Kills
from chaos.process import Ended, Process
from chaos.results import Lost, check_between, check_final
from dilated_attention_pytorch.training.metrics import read_metrics


def damage(kills: Kills, kind: Damage) -> tuple[str, str]:
    """One kind of damage: what it was, and what went wrong ("" for nothing)."""
    kills.straight("train")  # builds the corpus
    folder = kills.folder(kind.program, "damaged")
    cache = kills.root / "damaged-cache"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(os.environ["XDG_CACHE_HOME"], cache)
    if kind.program == "train":
        shutil.copytree(_half_way(kills), folder, dirs_exist_ok=True)
    in_cache = list(cache.rglob(kind.file))
    target = in_cache[0] if in_cache else next((folder / "run").glob(kind.file))
    kind.change(target)
    before = _digests(folder) | _digests(cache)
    (process,) = kills.start(kind.program, folder, env={"XDG_CACHE_HOME": str(cache)})
    ended = process.end()
    what = f"{kind.file}: {kind.name}"
    try:
        if Path("executed").exists():
            raise Lost("code in the file was executed")
        if kind.outcome == NAMED:
            check_named(ended, target.name, str(target.parent), str(folder / "run"))
            if changed := before.items() ^ (_digests(folder) | _digests(cache)).items():
                raise Lost(f"files changed although it was refused: {sorted({Path(name).name for name, _ in changed})}")
        elif ended.code:
            raise Lost(f"exit code {ended.code}: {ended.err.strip()[-300:]}")
        elif kind.outcome == MENDED:
            check_final(kind.program, folder, ended.out, kills.straight(kind.program).left)
        elif target.name not in ended.err or "gap" not in ended.err:
            raise Lost(f"not a word of what is gone: {ended.err.strip()[-300:]}")
        else:
            check_between(kind.program, folder, ended.out, {}, gaps=True)
    except Lost as lost:
        return what, str(lost)
    return what, ""


def check_named(ended: Ended, *names: str) -> None:
    """A command that refuses says so in one line, which holds one of the names, and nothing else but warnings."""
    lines = [line for line in ended.err.splitlines() if line.strip() and not line.startswith("warning: ")]
    if ended.code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
        raise Lost(f"exit code {ended.code} and {len(lines)} lines instead of an error in one: {ended.err[-300:]}")
    if not any(name in lines[0] for name in names):
        raise Lost(f"none of {names} in: {lines[0]}")


def full_disk(kills: Kills, program: str, size: int, ranks: int = 1) -> tuple[str, str]:
    """A disk of some bytes, or files of as many: named, nothing half is left, and with room it goes on."""
    what = f"{program}, {ranks} rank{'s'[: ranks - 1]}, {'disk' if os.getuid() == 0 else 'files'} of {size >> 10} KiB"
    folder = kills.folder(program, "full")
    try:
        with _disk(folder, size) as limit:
            ended = [process.end() for process in kills.start(program, folder, ranks, file_limit=limit)]
            left = [path.name for path in folder.rglob(".*.part")]
            shutil.copytree(folder, f"{folder}-kept")
        shutil.rmtree(folder)
        Path(f"{folder}-kept").rename(folder)
        check_named(ended[0], "expected room and permission to write", "No space left", "File too large")
        if left:
            raise Lost(f"half files that keep the disk full: {left}")
        check_between(program, folder, ended[0].out, kills.straight(program, ranks).left)
        kills.again(program, folder, ranks)
    except Lost as lost:
        return what, str(lost)
    return what, ""


def full_terminal(kills: Kills) -> tuple[str, str]:
    """Text that can be written nowhere."""
    folder = kills.folder("generate", "full")
    (process,) = kills.start("generate", folder, stdout="/dev/full")
    try:
        check_named(process.end(), "No space left")
        kills.again("generate", folder)
    except Lost as lost:
        return "generate into /dev/full", str(lost)
    return "generate into /dev/full", ""


def two_runs(kills: Kills, program: str, ranks: int = 1) -> tuple[str, str]:
    """The same command twice at once. Training refuses the second; the others write the same files, each at once."""
    what = f"{program}, {ranks} rank{'s'[: ranks - 1]}, twice in one folder"
    folder = kills.folder(program, "shared")
    first = kills.start(program, folder, ranks)
    if program == "train":
        _until((folder / "run" / "train.json").exists, first)
        for process in first:
            process.send(signal.SIGSTOP)  # or it might be done before the second one comes
    second = kills.start(program, folder, tag="-second")
    if program == "train":
        second[0].end()
        for process in first:
            process.send(signal.SIGCONT)
    for process in (*first, *second):
        process.end()
    try:
        ended = [process.end() for process in second]
        if program == "train":
            check_named(ended[0], f"no other run is writing to, got {folder / 'run'}")
        elif any(one.code for one in ended):
            raise Lost(f"exit code {ended[0].code}: {ended[0].err.strip()[-300:]}")
        if any(process.end().code for process in first):
            raise Lost(f"the first ended with {[process.end() for process in first]}")
        check_final(program, folder, first[0].end().out, kills.straight(program, ranks).left)
    except Lost as lost:
        return what, str(lost)
    return what, ""


def _half_way(kills: Kills) -> Path:
    """A run that was interrupted after its first save, made once."""
    folder = kills.root / "half-way"
    if not folder.exists():
        folder.mkdir()
        (process,) = kills.start("train", folder)
        _until(lambda: any((folder / "run").glob("step-*")), [process])
        process.send(signal.SIGTERM)
        ended, lines = process.end(), read_metrics(folder / "run" / "metrics.jsonl")
        if "interrupted" not in ended.err or len(lines) < 3:
            raise RuntimeError(f"expected a run to be interrupted, got {ended}")
    return folder


def _until(is_so: object, running: list[Process]) -> None:
    assert callable(is_so)
    while not is_so() and any(process.poll() is None for process in running):
        time.sleep(0.001)


@contextlib.contextmanager
def _disk(folder: Path, size: int) -> Iterator[int]:
    """A small disk at a folder, where root may mount one; elsewhere the limit on a file's size."""
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]).returncode:
        yield size
        return
    try:
        yield 0
    finally:
        subprocess.run(["umount", folder], check=True)


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
