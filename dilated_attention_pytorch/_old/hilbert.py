"""0.2's Hilbert rings: `HilbertRingAttention` with their arguments; see `ring` for what a rank is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch._old.ring import OldRingArguments, ring_call
from dilated_attention_pytorch.ring_attention.variants.hilbert import HilbertRingAttention, RingDilatedAttentionHilbert

_START = (
    "segment_lengths dilation_rates dropout ring_size device dtype enable_memory_pool enable_profiling "
    "use_pattern_cache use_flash_attention"
)


class _OldHilbertRing(OldRingArguments, HilbertRingAttention):  # type: ignore[misc]
    ordered = -1  # length of the sequence whose order is set

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """0.2 laid any sequence out on the smallest square that holds it, row by row."""
        length = query.shape[1] * self.world_size if query.dim() == 4 else 0
        if length not in (0, self.ordered):
            side = math.isqrt(length - 1) + 1
            index = torch.arange(length)
            self.set_order(torch.stack((index // side, index % side), 1))
            self.ordered = length
        return super().forward(query, *args, **kwargs)


# It takes rows in their own order, as it did; a model that orders once at its input takes its second base instead.
class RingDilatedAttentionHilbertOptimized(_OldHilbertRing, RingDilatedAttentionHilbert):  # type: ignore[misc]
    call = ring_call(
        "RingDilatedAttentionHilbertOptimized",
        f"{_START} hilbert_chunk_size cache_hilbert_mappings apply_hilbert_to_kv precompute_patterns "
        "overlap_communication",
    )


class RingDilatedAttentionHybridHilbert(_OldHilbertRing):
    call = ring_call(
        "RingDilatedAttentionHybridHilbert",
        f"{_START} precompute_patterns overlap_communication use_hilbert hilbert_chunk_size use_xformers attention_op",
    )
