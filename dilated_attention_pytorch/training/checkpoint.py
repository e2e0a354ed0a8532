"""The states of a run on disk: sharded, written behind the steps that follow, each of them whole or not there.

`step-00000012/` holds a safetensors file per process, as `torch.distributed.checkpoint` cuts them, and `state.json`:
what else a run needs to go on, and a CRC-32 per file. A state is written as `.step-00000012.part/` and then renamed, so
a name stands for a whole state. Any number of processes reads it; nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from dilated_attention_pytorch.core.files import checksum, parse_json, replace_text
from dilated_attention_pytorch.models.weights import safetensors
from dilated_attention_pytorch.training.distributed import World, host_group

VERSION = 2  # 1 was one file, state.pt
ABOUT = "state.json"
RESTART = "start over (restart=True)"
_NAME = re.compile(r"step-(\d{8,})")
_ERRORS = (Exception, CheckpointException)  # torch's own is no Exception
_PART = re.compile(r"\.step-\d{8,}\.part")


def steps_in(folder: Path) -> list[int]:
    """The steps whose states are in a run's folder, ascending."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(found[1]) for found in names if found)


def path_of(folder: Path, step: int) -> Path:
    """Where the state after a step is."""
    return folder / f"step-{step:08d}"


def read_about(path: Path) -> dict[str, Any]:
    """What `state.json` says of a state; a ValueError where it is damaged or of another version."""
    try:
        content = parse_json((path / ABOUT).read_text(encoding="utf-8"))
        about = content["about"]
        whole = content["crc32"] == zlib.crc32(json.dumps(about).encode())
        version, step = about["version"], about["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path / ABOUT, type(error).__name__) from error
    if not whole:
        raise damaged(path / ABOUT, "a wrong checksum")
    if version != VERSION:
        raise ValueError(f"expected a state of version {VERSION} in {path}, got {version}")
    if not isinstance(step, int) or path != path_of(path.parent, step):
        raise damaged(path / ABOUT, f"step {step}")
    return about  # type: ignore[no-any-return]


def load(path: Path, tensors: dict[str, Any], *, part: str = "", group: dist.ProcessGroup | None = None) -> None:
    """Read a state's tensors into those given, however they are sharded.

    Args:
        path: of the state.
        tensors: by name; to be written into.
        part: prefix of the names that are wanted, all of them by default.
        group: of the processes over which they are sharded; without one this process reads alone.

    Raises:
        ValueError: names, shapes or dtypes that are not those given.
    """
    safetensors()
    reader = HuggingFaceStorageReader(str(path))
    try:
        found: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        kinds = {name: (tuple(x.size), x.properties.dtype) for name, x in found.items() if name.startswith(part)}
        for name in sorted(kinds.keys() ^ tensors.keys()):
            raise ValueError(f"{'more' if name in kinds else 'less'} than the run has: {name}")
        for name, x in tensors.items():
            if kinds[name] != (tuple(x.shape), x.dtype):
                raise ValueError(f"{name} of shape {kinds[name][0]} and {kinds[name][1]}, not those of the run")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
            state_dict_loader.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except _ERRORS as error:  # safetensors has errors of its own
        raise damaged(path, _reason(error)) from error


def damaged(path: Path, found: str) -> ValueError:
    """The error of what is no state of a run."""
    return ValueError(f"expected {path} to hold the state of a run, got {found}: put a copy back, or {RESTART}")


class Checkpoints:
    """The states of the run in a folder, which all its processes see.

    A save copies the tensors to host memory and returns; a thread writes them, over a process group of its own: on the
    steps' group its collectives would meet theirs. torch's `async_save` ends before the checksums and the renaming,
    without which a state does not count, so the thread is ours and calls `save`.

    Args:
        folder: of the run.
        world: its processes.
        keep: how many of the last states stay.
    """

    def __init__(self, folder: Path, world: World, *, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep
        self.world = world
        if world.size > 1:
            group = host_group()
            self.world = replace(world, group=group, host=group)
        self.best: tuple[float, int] | None = None  # loss and step of a state that stays, however old
        # Through page-locked memory from a GPU. torch 2.11's DefaultStager cannot copy DTensors there.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=world.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._flying: Future[None] | None = None

    def newest(self) -> dict[str, Any] | None:
        """What the last state says of itself, after its files were held to their checksums; None if there is none.

        Raises:
            ValueError: a damaged state.
        """
        steps = self.world.everywhere(lambda: max(steps_in(self.folder), default=-1))
        step = steps[0]  # rank 0's: a file system may lag elsewhere
        if step < 0 and (self.folder / "state.pt").is_file():
            raise ValueError(
                f"expected a state of version {VERSION} in {self.folder}, got state.pt, which is of version 1: give "
                f"another folder, or {RESTART}"
            )
        return None if step < 0 else self.world.everywhere(partial(self._checked, path_of(self.folder, step)))[0]

    def _checked(self, path: Path) -> dict[str, Any]:
        about = read_about(path)
        sums = about["files"]
        for name in sorted(sums)[self.world.rank :: self.world.size]:  # each process reads its share
            if not (path / name).is_file():
                raise damaged(path, f"no {name}")
            if checksum(path / name) != sums[name]:
                raise damaged(path / name, "a wrong checksum")
        return about

    def load(self, step: int, tensors: dict[str, Any]) -> None:
        """Read the state after a step into the run's tensors."""
        self.world.everywhere(partial(load, path_of(self.folder, step), tensors, group=self.world.group))

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Begin to write the state after a step: it returns as soon as the tensors may change.

        Args:
            step: optimizer steps that were taken.
            tensors: all of the run, by name.
            about: what else it needs to go on, in types that JSON has.

        Raises:
            OSError: the state before could not be written.
        """
        safetensors()
        self.wait()
        staged = self._stager.stage(dict(tensors))
        self._flying = self._thread.submit(self._write, step, staged, dict(about))

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            OSError: it could not be written; nothing of it is left.
        """
        flying, self._flying = self._flying, None
        if flying is not None:
            flying.result()

    def close(self) -> None:
        """Wait for the state that is being written, and stop."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._stager.close()

    def sweep(self, *, everything: bool = False) -> None:
        """Remove what killed processes left, half-written or old; with `everything`, all states. In one process."""
        for path in self.folder.iterdir():
            if _PART.fullmatch(path.name):
                shutil.rmtree(path)
        if everything:
            (self.folder / "state.pt").unlink(missing_ok=True)
            for step in steps_in(self.folder):
                self._remove(step)
        self._prune()

    def _write(self, step: int, tensors: Any, about: dict[str, Any]) -> None:
        part, place = self.folder / f".step-{step:08d}.part", path_of(self.folder, step)
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is one process, and torch's use of its own old names
                group = self.world.group
                state_dict_saver.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
            own = sorted(part.glob(f"shard-{self.world.rank + 1:05d}-*"))
            sums = self.world.everywhere(lambda: {path.name: _written(path) for path in own})
            about |= {"step": step, "version": VERSION, "files": {k: v for one in sums for k, v in one.items()}}
            self.world.first(partial(self._commit, part, place, about))
        except _ERRORS as error:
            if self.world.is_main:
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"expected room and permission to write {place}, got: {_reason(error)}") from error

    def _commit(self, part: Path, place: Path, about: dict[str, Any]) -> None:
        if missing := [name for name in about["files"] if not (part / name).is_file()]:
            raise FileNotFoundError(f"no {missing[0]}: all processes have to see one folder")
        about = json.loads(json.dumps(about))
        text = json.dumps({"about": about, "crc32": zlib.crc32(json.dumps(about).encode())}, indent=1)
        replace_text(part / ABOUT, text + "\n")
        os.replace(part, place)
        _sync(self.folder)
        self._prune()

    def _prune(self) -> None:
        for step in steps_in(self.folder)[: -self.keep]:
            if self.best is None or step != self.best[1]:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Remove a state; half of it never has its name."""
        part = self.folder / f".step-{step:08d}.part"
        os.replace(path_of(self.folder, step), part)
        shutil.rmtree(part)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on any rank."""
    for first, _ in getattr(error, "failures", {}).values():
        return _reason(first)
    return (str(error).splitlines() or [type(error).__name__])[0]


def _written(path: Path) -> int:
    """The CRC-32 of a file that is now on the disk itself."""
    with path.open("r+b") as stream:
        os.fsync(stream.fileno())
    return checksum(path)


def _sync(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # not Windows
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
