"""What workers run to see the ring's exchange buffers."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ring_tasks import Groups, RingCase

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.ring_attention import RingError, exchange_pool
from dilated_attention_pytorch.ring_attention.utils import communication


def steps(groups: Groups, case: RingCase, world_size: int, mode: str, count: int) -> list[dict[str, Any]]:
    """The pool's figures after each of some steps, forward and backward."""
    rank, found = dist.get_rank(), []
    if rank >= world_size:
        return found
    exchange_pool().trim()
    for _ in range(count):
        case.shard(groups[world_size], rank, world_size, mode, torch.float64)
        gc.collect()
        stats = exchange_pool().stats()
        found.append(
            {
                "live": stats.live,
                "dropped": stats.dropped,
                "misses": stats.misses,
                "borrows": stats.hits + stats.misses,
                "purposes": sorted(name for name, c in stats.by_purpose.items() if c.requested),
                "flying": len(communication._flying),
            }
        )
    return found


def results_after_poison(groups: Groups, case: RingCase, world_size: int, mode: str) -> dict[str, torch.Tensor] | None:
    """A step whose every buffer is overwritten with NaN as soon as it goes back to the pool."""
    rank = dist.get_rank()
    if rank >= world_size:
        return None
    pool = exchange_pool()
    release = type(pool)._release

    def poisoned(self: Any, handle: Any, stream: Any) -> None:
        if not handle.released and handle.tensor.numel():
            fill = float("nan") if handle.tensor.is_floating_point() else True
            handle.tensor.fill_(fill)
        release(self, handle, stream)

    with mock.patch.object(type(pool), "_release", poisoned):
        return case.shard(groups[world_size], rank, world_size, mode, torch.float64)


def after_a_failure(groups: Groups, case: RingCase, world_size: int) -> tuple[int, int]:
    """Blocks that stay lent, and exchanges that stay in flight, after a wait that failed."""
    rank = dist.get_rank()
    if rank >= world_size:
        return 0, 0
    exchange_pool().trim()

    class Broken:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            self.work.wait()  # so that the ranks stay in step
            raise RuntimeError("broken pipe")

    all_to_all = torch_private.all_to_all
    with mock.patch.object(torch_private, "all_to_all", lambda *a: Broken(all_to_all(*a))):
        try:
            case.shard(groups[world_size], rank, world_size, "sparse", torch.float64)
        except RingError:
            pass
        else:
            raise AssertionError("expected a RingError")
    gc.collect()
    return exchange_pool().stats().live, len(communication._flying)
