"""Sequences over several processes: the part of each rank, and how parameters are sharded, gathered and spread again.

Ranks form a mesh of two dimensions, data x context. The ranks of a row share each sequence, one contiguous shard per
rank; rows read different excerpts. Parameters are sharded over all ranks (FSDP2), so the mean of gradients spans both
dimensions.
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
class RankLayout:
    """The part of a batch that a process computes.

    Attributes:
        data_rank: number of its reader, a group of ranks that share sequences.
        data_size: number of readers.
        context_rank: number of its shard of each sequence.
        context_size: shards per sequence.
        mesh: data x context; None where each process reads whole sequences.
    """

    data_rank: int
    data_size: int
    context_rank: int = 0
    context_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def seed(self) -> int:
        """Sets this process's draws apart; the first shard has those of a process with the whole sequence."""
        return self.data_rank + self.data_size * self.context_rank

    def shard(self, excerpts: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
        """This process's inputs `(B, n)` and labels `(B, n)` of excerpts `(B, N + 1)`, and arguments of the model.

        Labels are shifted before the cut: the last label of a shard is the first input of the next one.
        """
        inputs, labels = excerpts[:, :-1], excerpts[:, 1:]
        if self.mesh is None:
            return inputs, labels, {}
        # Here, since a run on one process needs no ring.
        from dilated_attention_pytorch.ring_attention.plan import equal_bounds

        start, stop = equal_bounds(inputs.shape[1], self.context_size)[self.context_rank : self.context_rank + 2]
        return inputs[:, start:stop], labels[:, start:stop], {"seq_len": inputs.shape[1]}


def arrange(world: World, context_parallel: int) -> RankLayout:
    """The layout with `context_parallel` processes per sequence, a divisor of their number.

    Neighbouring ranks share a sequence: the exchange within a layer needs the fast links most.
    """
    if context_parallel == 1:
        return RankLayout(world.rank, world.size)
    readers = world.size // context_parallel
    mesh = init_device_mesh(world.device.type, (readers, context_parallel), mesh_dim_names=("data", "context"))
    data_rank, context_rank = divmod(world.rank, context_parallel)
    return RankLayout(data_rank, readers, context_rank, context_parallel, mesh)


def shard_model(model: LongNetLM, mesh: DeviceMesh) -> None:
    """Turn attention into ring attention over "context" and shard the parameters over all ranks, in place."""
    from torch.distributed.fsdp import fully_shard

    model.shard_context(mesh, mesh_dim="context")
    # One dimension over all ranks: given two, FSDP2 would shard over one and replicate over the other.
    ranks = init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("ranks",))
    # One layer at a time is whole in memory.
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=ranks)
    fully_shard(model, mesh=ranks)


def gradients(runner: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """A context for a micro-step: gradients are exchanged only in a step's last one."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(runner, FSDPModule):
        runner.set_requires_gradient_sync(last)
    elif isinstance(runner, nn.parallel.DistributedDataParallel) and not last:
        return runner.no_sync()
    return nullcontext()


def complete(value: Tensor) -> Tensor:
    """The whole of a tensor; collective if it is sharded."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def whole(state: Any, *, keep: bool) -> Any:
    """A state dict of nested dicts and lists with its sharded tensors whole, on the CPU; collective if there are any.

    Without `keep` a process only takes part, and holds one tensor at a time.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        full = complete(state)
        # A copy: a gather may return memory that the next step writes to.
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
    """An optimizer's state dict, its tensors sharded as their parameters are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def shard(value: Any, p: Tensor) -> Any:
        if not isinstance(p, DTensor) or not isinstance(value, Tensor) or value.shape != p.shape:
            return value
        # Every rank has read the same file, so nothing travels.
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

    # State dicts number the parameters in the order of the groups.
    kept = {i: {key: shard(value, parameters[i]) for key, value in one.items()} for i, one in state["state"].items()}
    return {**state, "state": kept}
