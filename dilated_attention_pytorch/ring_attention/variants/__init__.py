"""Rings beside the plain one: along a curve, and what Triton has to do with it."""

from __future__ import annotations

from dilated_attention_pytorch.ring_attention.variants.hilbert import (
    HilbertMixin,
    HilbertRingAttention,
    RingDilatedAttentionHilbert,
)

__all__ = ["HilbertMixin", "HilbertRingAttention", "RingDilatedAttentionHilbert"]
