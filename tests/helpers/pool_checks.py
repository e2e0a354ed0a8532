"""What every test of the memory pool asks of its figures and of the blocks that are lent together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from dilated_attention_pytorch import UnifiedMemoryPool


def adds_up(pool: UnifiedMemoryPool) -> Any:
    stats = pool.stats()
    assert stats.reserved == stats.current + stats.waste + stats.free
    assert 0 <= stats.fragmentation <= 1
    for table in (stats.by_purpose, stats.by_device):
        for field in ("current", "requested", "waste", "live", "hits", "misses", "waits"):
            assert sum(getattr(c, field) for c in table.values()) == getattr(stats, field), field
    assert stats.peak_reserved >= stats.reserved and stats.peak >= stats.current
    return stats


def spans(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel())


def assert_disjoint(tensors: list[Tensor]) -> None:
    found = spans(tensors)
    assert all(a[1] <= b[0] for a, b in pairwise(found)), "two live blocks overlap"
