"""What the workers of test_linears.py run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tiny_models import build, has_own, values
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def step(groups: dict[int, dist.ProcessGroup], kind: str, every: bool, again: bool) -> dict[str, Tensor]:
    """This rank's output, and the mean gradients.

    Args:
        kind: the model.
        every: shard every module with parameters of its own, the model last; otherwise every Linear alone.
        again: whether layers are computed again in the backward.
    """
    rank, mesh = dist.get_rank(), DeviceMesh.from_group(groups[2], "cpu")
    options: dict[str, Any] = {"gradient_checkpointing": True} if again else {}
    model, given = build(kind, **options)
    for module in reversed(list(model.modules())):  # the outer ones later
        if isinstance(module, nn.Linear) or (every and (module is model or has_own(module))):
            fully_shard(module, mesh=mesh)
    out = values(model(*(x[rank : rank + 1] for x in given)))
    out.square().sum().backward()
    found = {"out": out.detach()}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        if isinstance(parameter, torch.distributed.tensor.DTensor):
            grad = grad.full_tensor()
        else:
            dist.all_reduce(grad, group=groups[2])
            grad = grad / 2
        found[name] = grad
    return found
