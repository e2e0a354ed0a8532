"""Where exchange buffers come from: one pool per process, since their sizes return with every layer and step.

What a backward will read is no exchange buffer: rows that are kept, and everything that autograd saves, are ordinary
tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from dilated_attention_pytorch.core.memory.handle import Handle
from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool


@functools.cache
def exchange_pool() -> UnifiedMemoryPool:
    """The pool that ring attention's exchange buffers are borrowed from.

    Its purposes are what travels and in which direction: "rows sent", "gradients received". Between steps it keeps the
    memory; `exchange_pool().trim()` gives it back.

    Returns:
        The process's pool, with no limit and strategy "fragment_aware": measured as good as any on exchanges
        (`benchmarks/pool.py`), and unlike "adaptive" it never changes its mind, so addresses stay.
    """
    return UnifiedMemoryPool("fragment_aware")


def borrow(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, purpose: str, *, zero: bool = False
) -> Handle:
    """A buffer for one exchange."""
    return exchange_pool().borrow(shape, dtype, device, purpose, zero=zero)
