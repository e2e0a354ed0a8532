"""Ways to compute a rank's share; loaded when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dilated_attention_pytorch.ring_attention.variants.hilbert import (
        HilbertMixin,
        HilbertRingAttention,
        RingDilatedAttentionHilbert,
    )

__all__ = ["HilbertMixin", "HilbertRingAttention", "RingDilatedAttentionHilbert"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("dilated_attention_pytorch.ring_attention.variants.hilbert"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
