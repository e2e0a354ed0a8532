"""0.2's Hilbert rings: `HilbertRingAttention` with their arguments; see `ring` for what a rank is given."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from dilated_attention_pytorch._old.attention import no_mask
from dilated_attention_pytorch._old.ring import construction
from dilated_attention_pytorch.ring_attention.config import OLD_RING
from dilated_attention_pytorch.ring_attention.variants.hilbert import HilbertRingAttention

_START = ("segment_lengths", "dilation_rates", "dropout", "ring_size", "device", "dtype", "enable_memory_pool",
          "enable_profiling", "use_pattern_cache", "use_flash_attention")  # fmt: skip
_FLAGS = ("hilbert_chunk_size", "cache_hilbert_mappings", "apply_hilbert_to_kv", "precompute_patterns",
          "overlap_communication", "use_hilbert", "use_xformers", "attention_op")  # fmt: skip


class _OldHilbertRing(HilbertRingAttention):
    old_order: ClassVar[tuple[str, ...]] = _START

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        call = OLD_RING._replace(order=self.old_order, keywords=(*OLD_RING.order, *OLD_RING.keywords, *_FLAGS))
        super().__init__(**construction(type(self).__name__, call, args, kwargs))
        self.ordered = -1  # length of the sequence whose order is set

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
        **new: Any,
    ) -> Tensor:
        """`HilbertRingAttention.forward`; see `no_mask`."""
        no_mask("attention_mask", attention_mask)
        length = query.shape[1] * self.world_size if query.dim() == 4 else 0
        if length not in (0, self.ordered):
            # 0.2 laid any sequence out on the smallest square that holds it, row by row.
            side = math.isqrt(length - 1) + 1
            index = torch.arange(length)
            self.set_order(torch.stack((index // side, index % side), 1))
            self.ordered = length
        return super().forward(query, key, value, is_causal, **new)


class RingDilatedAttentionHilbertOptimized(_OldHilbertRing):
    """0.2's name."""

    old_order = (*_START, "hilbert_chunk_size", "cache_hilbert_mappings", "apply_hilbert_to_kv", "precompute_patterns",
             "overlap_communication")  # fmt: skip


class RingDilatedAttentionHybridHilbert(_OldHilbertRing):
    """0.2's name."""

    old_order = (*_START, "precompute_patterns", "overlap_communication", "use_hilbert", "hilbert_chunk_size",
             "use_xformers", "attention_op")  # fmt: skip
