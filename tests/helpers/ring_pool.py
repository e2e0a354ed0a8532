"""Real ranks (gloo, or NCCL with a GPU each) that live as long as the test session: many cases share one launch.

The parent hosts the store, as torchrun's agent does, so a rank may die without taking the store with it. Worker i is
rank i of every group; a group of w ranks is made of the first w workers. Workers are forks of one server that has the
library loaded and has computed nothing, so a pool is there at once. Where a worker dies unasked or hangs, one test
fails, with its name and signal, and the next has new workers.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 120.0  # seconds for one task: a hang becomes a failure


class Failure(Exception):
    """A task raised; the text is the worker's traceback."""


class Lost(AssertionError):
    """A worker ended or gave no answer. Where one that crashed stood is on stderr."""


class Pool:
    """Workers that run functions of a module by name: `function(groups, *arguments)` on every one of them."""

    def __init__(self, size: int, group_sizes: Sequence[int], module: str, backend: str = "gloo") -> None:
        self.size = size
        self.group_sizes, self.module, self.backend = tuple(group_sizes), module, backend
        self.open()

    def open(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dilated_attention_pytorch.ring_attention", "ring_pool"])
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, self.group_sizes, self.store.port, theirs, self.module, self.backend)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, function: str, *arguments: Any) -> None:
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send((function, arguments))
            except OSError as error:
                raise self._lost(rank, "takes no task") from error

    def results(self, limit: float = LIMIT, dead: Sequence[int] = ()) -> list[Any]:
        """What each worker returned, or the exception's text as a `Failure`; None for a worker meant to die."""
        deadline, found = time.monotonic() + limit, []
        for rank, pipe in enumerate(self.pipes):
            if rank in dead:
                found.append(None)
                continue
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise self._lost(rank, f"gave no answer within {limit} s: a hang")
            try:
                found.append(pipe.recv())
            except (EOFError, OSError) as error:
                self.processes[rank].join(10)
                raise self._lost(rank, "gave no answer") from error
        return found

    def run(self, function: str, *arguments: Any) -> list[Any]:
        self.start(function, *arguments)
        found = self.results()
        for rank, result in enumerate(found):
            if isinstance(result, Failure):
                raise AssertionError(f"worker {rank}:\n{result}")
        return found

    def _lost(self, rank: int, what: str) -> Lost:
        """What to raise, with every worker that ended; new ones take the place of all."""
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes) if not process.is_alive()}
        ended = [f"worker {rank} ended with {_ending(code)}" for rank, code in codes.items()]
        self.close()
        self.open()
        return Lost("; ".join([f"worker {rank} {what}", *ended]))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def work(
    rank: int, size: int, group_sizes: tuple[int, ...], port: int, pipe: Connection, module: str, backend: str
) -> None:
    if backend == "nccl":
        torch.cuda.set_device(rank)
    faulthandler.enable()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=60))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    groups = {n: dist.new_group(list(range(n))) for n in group_sizes}
    tasks = importlib.import_module(module)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            result = getattr(tasks, function)(groups, *arguments)
        except Exception as error:
            result = Failure(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        pipe.send(result)
