"""The processes of a run: rank, number, and the few collectives that training needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():  # before there is a group: see ring_attention/utils/communication.py
    import torch.distributed.nn

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A process, its device and the number of processes.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)) > 0) if self.size > 1 else flag

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            dist.barrier()

    def first(self, work: Callable[[], T]) -> T | None:
        """Do work in the main process while the others wait: its result there, None in the others.

        Raises:
            ConnectionAbortedError: in the others, when it failed; the main process raises its own error.
        """
        if not self.is_main:
            if self.any(False):
                raise ConnectionAbortedError(f"rank {self.rank} ends: rank 0 failed, and says why")
            return None
        try:
            done = work()
        except BaseException:
            self.any(True)
            raise
        self.any(False)
        return done


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """Join the world that torchrun describes in the environment, or a world of one, and leave it at the end.

    Args:
        device: `"cpu"`, `"cuda"` or `"cuda:1"`; by default CUDA where there is one. Under torchrun each process takes
            the CUDA device of its local rank.

    Raises:
        ValueError: no CUDA here, or one numbered device for several processes.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected a device this machine has, got {device!r}: torch finds no CUDA device here")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        if chosen.index is not None:
            raise ValueError(f"expected device 'cuda' under torchrun, got {device!r} for {size} processes")
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        dist.barrier()  # no process destroys the group while another still works
    finally:
        if mine:
            dist.destroy_process_group()
