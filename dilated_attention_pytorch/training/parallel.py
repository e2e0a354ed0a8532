"""Sequences over several processes: who reads what, and how parameters are sharded, gathered and spread again.

Ranks form a mesh of two dimensions, data x context: those of one row share every sequence they read, a contiguous shard
each; rows read different excerpts. Parameters are sharded over all ranks (FSDP2), whose mean of gradients then spans
both dimensions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.training.distributed import World


@dataclass(frozen=True)
class Layout:
    """Which part of a batch a process computes.

    Attributes:
        data_rank: which of the readers this process belongs to.
        data_size: number of readers.
        context_rank: which shard of its reader's sequences it holds.
        context_size: number of shards of a sequence.
        mesh: data x context; None where each process reads whole sequences.
    """

    data_rank: int
    data_size: int
    context_rank: int = 0
    context_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def seed(self) -> int:
        """What sets this process's draws apart; the first shard's are those of a process with the whole sequence."""
        return self.data_rank + self.data_size * self.context_rank

    def shard(self, excerpts: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
        """This process's inputs, the token after each, and what the model must know of the whole.

        Labels are shifted before the cut: the last label of a shard is the first input of the next one.

        Args:
            excerpts: `(B, N + 1)`.

        Returns:
            Two `(B, n)`, and keyword arguments.
        """
        inputs, labels = excerpts[:, :-1], excerpts[:, 1:]
        if self.mesh is None:
            return inputs, labels, {}
        # Loaded here: a run on one process needs no ring.
        from dilated_attention_pytorch.ring_attention.plan import equal_bounds

        start, stop = equal_bounds(inputs.shape[1], self.context_size)[self.context_rank : self.context_rank + 2]
        return inputs[:, start:stop], labels[:, start:stop], {"seq_len": inputs.shape[1]}


def arrange(world: World, context_parallel: int) -> Layout:
    """The layout of `context_parallel` processes to a sequence, which the world's size is a multiple of.

    Neighbouring ranks share a sequence: the exchange within a layer is the traffic that needs the fast links most.
    """
    if context_parallel == 1:
        return Layout(world.rank, world.size)
    readers = world.size // context_parallel
    mesh = init_device_mesh(world.device.type, (readers, context_parallel), mesh_dim_names=("data", "context"))
    data_rank, context_rank = divmod(world.rank, context_parallel)
    return Layout(data_rank, readers, context_rank, context_parallel, mesh)


def shard_model(model: LongNetLM, mesh: DeviceMesh) -> None:
    """Makes the attention ring attention over "context", and shards the parameters over all ranks, in place."""
    from torch.distributed.fsdp import fully_shard

    model.shard_context(mesh, mesh_dim="context")
    # One dimension over all ranks: given two, FSDP2 would shard over one and replicate over the other.
    ranks = init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("ranks",))
    # A layer at a time is whole in memory, and gone again when the next one comes.
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=ranks)
    fully_shard(model, mesh=ranks)


def gradients(runner: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """What a micro-step runs in, so that gradients are exchanged with a step's last one alone."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(runner, FSDPModule):
        runner.set_requires_gradient_sync(last)
    elif isinstance(runner, nn.parallel.DistributedDataParallel) and not last:
        return runner.no_sync()
    return nullcontext()


def complete(value: Tensor) -> Tensor:
    """The whole of a tensor, sharded or not; collective where it is."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def whole(state: Any, *, keep: bool) -> Any:
    """A state dict with its sharded tensors made whole, on the CPU; collective where there are any.

    Args:
        state: nested dicts and lists.
        keep: whether this process wants the result; the others hold one tensor at a time.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        full = state.full_tensor()
        # A copy: what a gather returns may be memory that the next step writes to.
        return full.detach().to("cpu", copy=True) if keep else None
    if isinstance(state, dict):
        made = copy(state)  # a module's has a class and notes of its own
        for key, value in state.items():
            made[key] = whole(value, keep=keep)
        return made
    if isinstance(state, list):
        return [whole(value, keep=keep) for value in state]
    return state


def spread(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dict, its tensors sharded as the parameters are that they belong to."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(isinstance(p, DTensor) for p in parameters):
        return state

    def shard(value: Any, p: DTensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != p.shape:
            return value
        # Every rank has read the same file: nothing needs to travel.
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

    # By number: state dicts count the parameters in the order of the groups.
    kept = {i: {key: shard(value, parameters[i]) for key, value in one.items()} for i, one in state["state"].items()}
    return {**state, "state": kept}
