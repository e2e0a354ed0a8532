"""Exact dilated attention (LongNet, arXiv 2307.02486) for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# 0.4.0: goes with _old. Must come first: importing the old submodule binds `dilated_attention` to the module; the
# 0.4.0: goes with _old. import of the function below rebinds it.
__path__ = [*__path__, f"{__path__[0]}/_old/places"]  # 0.4.0: goes with _old
from dilated_attention_pytorch._old.package import old_name  # 0.4.0: goes with _old
from dilated_attention_pytorch.core.merge import merge_attention
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.functional import dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.head_groups import legacy_mode
from dilated_attention_pytorch.modules import DilatedAttention, MultiheadDilatedAttention
from dilated_attention_pytorch.types import AttentionOutput

if TYPE_CHECKING:
    from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool
    from dilated_attention_pytorch.models import (
        LongNet,
        LongNetConfig,
        LongNetEncoder,
        LongNetLM,
        LongViT,
        LongViTConfig,
        SlideEncoder,
        SlideEncoderConfig,
    )
    from dilated_attention_pytorch.ring_attention import (
        BaseRingAttention,
        HilbertMixin,
        HilbertRingAttention,
        RingAttentionConfig,
        RingDilatedAttention,
        RingDilatedAttentionHilbert,
        RingDistributedDilatedAttention,
        RingError,
    )
    from dilated_attention_pytorch.streaming import dilated_attention_streamed

__version__ = "0.3.0.dev0"

__all__ = [
    "AttentionOutput",
    "BaseRingAttention",
    "DilatedAttention",
    "DilatedPattern",
    "HilbertMixin",
    "HilbertRingAttention",
    "LongNet",
    "LongNetConfig",
    "LongNetEncoder",
    "LongNetLM",
    "LongViT",
    "LongViTConfig",
    "MultiheadDilatedAttention",
    "RingAttentionConfig",
    "RingDilatedAttention",
    "RingDilatedAttentionHilbert",
    "RingDistributedDilatedAttention",
    "RingError",
    "SlideEncoder",
    "SlideEncoderConfig",
    "UnifiedMemoryPool",
    "dilated_attention",
    "dilated_attention_streamed",
    "dilated_attention_with_lse",
    "legacy_mode",
    "merge_attention",
]

# Loaded when first asked for, so that importing the op costs no more than it must.
_LAZY = {"UnifiedMemoryPool": "core.memory.unified_pool", "dilated_attention_streamed": "streaming"}
_LAZY |= dict.fromkeys((name for name in __all__ if name.startswith(("Long", "Slide"))), "models")
_LAZY |= dict.fromkeys((name for name in __all__ if "Ring" in name or "Hilbert" in name), "ring_attention")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    if (old := old_name(name)) is not None:  # 0.4.0: goes with _old
        return old  # 0.4.0: goes with _old
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
