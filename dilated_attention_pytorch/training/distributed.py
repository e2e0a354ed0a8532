"""The processes of a run, the part of a sequence that each computes, and parameters sharded over them.

Ranks form a mesh of two dimensions, data x context. The ranks of a row share each sequence, one contiguous shard per
rank; rows read different excerpts. Parameters, where they are sharded, are sharded over all ranks (FSDP2), so the mean
of gradients spans both dimensions. A model is built on the meta device: a rank makes its own share of it alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.modules.module import register_module_module_registration_hook

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.messages import quoted
from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.models.layers import Layer

if dist.is_available():  # before there is a group: see ring_attention/utils/communication.py
    import torch.distributed.nn

T = TypeVar("T")
# Seconds between a group's last collective and its end. A gloo thread drops the tensors of that collective under
# Python's lock; where the group ended first, it held that lock while it waited for the thread, and the rank hung.
_SETTLE = 0.5
# How long ranks wait for what one of them does alone: reading a corpus, embedding its last slides. NCCL's own patience,
# 10 minutes, is for collectives that all take part in. A rank that ends is noticed at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class World:
    """A process, its device and the number of processes."""

    rank: int  # of this process, from 0
    size: int  # number of processes
    device: torch.device  # where this process computes
    group: dist.ProcessGroup | None = None  # of these processes; the default one where there are several
    host: dist.ProcessGroup | None = None  # the same, where one may wait long for another (`host_group`)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)) > 0) if self.size > 1 else flag

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Do work in each process, and return the results of all, by rank.

        Raises:
            ConnectionAbortedError: it failed in another process, which raises its own error.
        """
        result, failed = None, True
        try:
            result = work()
            failed = False
        finally:  # the others learn of an error before it ends this process
            results: list[Any] = [(failed, result)] * self.size
            if self.size > 1:
                dist.all_gather_object(results, (failed, result), group=self.host)
        for rank, (lost, _) in enumerate(results):
            if lost:
                raise ConnectionAbortedError(f"rank {self.rank} ends: rank {rank} failed, and says why")
        return [one for _, one in results]

    def first(self, work: Callable[[], T]) -> T | None:
        """Do work in the main process while the others wait, as `everywhere`: its result there, None in the others."""
        done: list[T] = []
        self.everywhere(lambda: done.append(work()) if self.is_main else None)
        return done[0] if done else None


def meet(work: Callable[[], T]) -> T:
    """What work returns, which waits for other ranks: a process that is interrupted meanwhile ends at once.

    Ranks meet in C++, which looks at no signals for as long as a group's timeout (minutes) if one never comes. So that
    is done by a thread, and this one waits for it in Python.
    """
    done: list[T] = []
    failed: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has one of its own
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="meet", daemon=True)  # no interrupted process waits for it
    thread.start()
    thread.join()
    for error in failed:
        raise error
    return done[0]


def host_group() -> dist.ProcessGroup:
    """A new group of all ranks that waits on the host, for days. Collective."""
    group = meet(lambda: dist.new_group(backend="gloo", timeout=_PATIENCE))
    assert isinstance(group, dist.ProcessGroup)
    return group


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
        raise ValueError(f"expected a device this machine has, got {quoted(device)}: torch finds no CUDA device here")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        if chosen.index is not None:
            raise ValueError(f"expected device 'cuda' under torchrun, got {quoted(device)} for {size} processes")
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    mine = not dist.is_initialized()
    if mine:
        meet(lambda: dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo"))
    try:
        host = host_group()
        yield World(dist.get_rank(), dist.get_world_size(), chosen, host=host)
        meet(lambda: dist.barrier(host))  # no process destroys the group while another still works
    finally:
        if mine:
            torch_private.forget_meshes()
            time.sleep(_SETTLE)
            dist.destroy_process_group()


@dataclass(frozen=True)
class RankLayout:
    """The part of a batch that a process computes. Ranks that share sequences are one reader."""

    data_rank: int  # number of its reader
    data_size: int  # number of readers
    context_rank: int = 0  # number of its shard of each sequence
    context_size: int = 1  # shards per sequence
    mesh: DeviceMesh | None = None  # data x context, over which parameters are sharded; None where each has them whole

    @property
    def seed(self) -> int:
        """Sets this process's draws apart; the first shard has those of a process with the whole sequence."""
        return self.data_rank + self.data_size * self.context_rank

    def shard(self, excerpts: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
        """This process's inputs `(B, n)` and labels `(B, n)` of excerpts `(B, N + 1)`, and arguments of the model.

        Labels are shifted before the cut: the last label of a shard is the first input of the next one.
        """
        inputs, labels = excerpts[:, :-1], excerpts[:, 1:]
        if self.context_size == 1:
            return inputs, labels, {}
        # Here, since a run on one process needs no ring.
        from dilated_attention_pytorch.ring_attention.plan import equal_bounds

        start, stop = equal_bounds(inputs.shape[1], self.context_size)[self.context_rank : self.context_rank + 2]
        return inputs[:, start:stop], labels[:, start:stop], {"seq_len": inputs.shape[1]}


def arrange(world: World, context_parallel: int, *, sharded: bool = False) -> RankLayout:
    """The layout with `context_parallel` processes per sequence, a divisor of their number; with `sharded`, parameters
    are sharded too where no sequence is. Neighbouring ranks share one: the exchange within a layer needs the fast links
    most."""
    if world.size == 1 or (context_parallel == 1 and not sharded):
        return RankLayout(world.rank, world.size)
    readers = world.size // context_parallel
    shape, names = (readers, context_parallel), ("data", "context")
    mesh = meet(lambda: init_device_mesh(world.device.type, shape, mesh_dim_names=names))
    data_rank, context_rank = divmod(world.rank, context_parallel)
    return RankLayout(data_rank, readers, context_rank, context_parallel, mesh)


def shard_model(model: LongNetLM, mesh: DeviceMesh, *, half: torch.dtype | None = None, compiled: bool = False) -> None:
    """Turn attention into ring attention over "context" and shard the parameters over all ranks, in place.

    Args:
        model: on any device, the meta device too.
        mesh: data x context.
        half: gather weights in this dtype to compute with; gradients are summed in fp32.
        compiled: compile each layer; the graph breaks at the ring, whose lengths the ranks find out together.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh["context"].size() > 1:
        model.shard_context(mesh, mesh_dim="context")
    # One dimension over all ranks: given two, FSDP2 would shard over one and replicate over the other.
    ranks = meet(lambda: init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("ranks",)))
    # Autocast alone would keep a copy of every weight in bf16, whole, until the backward.
    # On a CPU autocast would leave LayerNorms their bf16 gains beside fp32 rows, which torch does not take.
    options: dict[str, Any] = {}
    if half and mesh.device_type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    # One layer at a time is whole in memory.
    for layer in model.decoder.layers:
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=ranks, **options)
    fully_shard(model, mesh=ranks)  # embeddings in fp32, which the residual stream is in


def first_weights(model: LongNetLM, seed: int) -> None:
    """Fill a model with the first weights of a seed, the same on any device and however it is sharded.

    A whole model is built on the CPU, where one layer at a time has memory: each is taken as soon as it is drawn.
    """
    mine = model.state_dict()

    def take(module: nn.Module, prefix: str) -> None:
        for name, x in module.state_dict(prefix=prefix).items():
            if not x.is_meta:
                fill(mine[name], x)

    def registered(parent: nn.Module, name: str, module: nn.Module | None) -> Any:
        if not isinstance(module, Layer):
            return None
        take(module, f"decoder.layers.{name}.")
        return module.to("meta")

    torch.manual_seed(seed)
    hook = register_module_module_registration_hook(registered)
    try:
        rest = LongNetLM(model.config)
    finally:
        hook.remove()
    take(rest, "")


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Write a tensor that every rank has whole into a parameter, or a rank's share of one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        # Every rank has the same, so nothing travels.
        whole = whole.to(parameter.device)
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


def gradients(runner: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """A context for a micro-step. DDP exchanges gradients in a step's last one alone; FSDP2 in each, for want of room
    for the gradients of all parameters."""
    if isinstance(runner, nn.parallel.DistributedDataParallel) and not last:
        return runner.no_sync()
    return nullcontext()


def complete(value: Tensor) -> Tensor:
    """The whole of a tensor; collective if it is sharded."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
