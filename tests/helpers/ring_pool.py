"""Real ranks (gloo, or NCCL with a GPU each) that live as long as the test session: many cases share one launch.

The parent hosts the store, as torchrun's agent does, so a rank may die without taking the store with it. Worker i is
rank i of every group; a group of w ranks is made of the first w workers. Workers are forks of one server that has the
library loaded and has computed nothing, so a pool is there at once. A worker that dies unasked fails the test that it
dies in, by name and signal, and no other: the next run has new workers.
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


class Died(AssertionError):
    """A worker ended in the middle of a task. Where it stood is on stderr."""


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
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def results(self, limit: float = LIMIT, dead: Sequence[int] = ()) -> list[Any]:
        """What each worker returned, or the exception's text as a `Failure`; None for a worker meant to die."""
        deadline, found = time.monotonic() + limit, []
        for rank, pipe in enumerate(self.pipes):
            if rank in dead:
                found.append(None)
                continue
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise AssertionError(f"worker {rank} gave no answer within {limit} s: a hang")
            try:
                found.append(pipe.recv())
            except EOFError:
                raise Died(f"worker {rank} ended with {self._ending(rank)}; before it: {found}") from None
        return found

    def run(self, function: str, *arguments: Any) -> list[Any]:
        if not all(process.is_alive() for process in self.processes):
            self.close()
            self.open()
        self.start(function, *arguments)
        found = self.results()
        for rank, result in enumerate(found):
            if isinstance(result, Failure):
                raise AssertionError(f"worker {rank}:\n{result}")
        return found

    def _ending(self, rank: int) -> str:
        process = self.processes[rank]
        process.join(10)
        code = process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


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
