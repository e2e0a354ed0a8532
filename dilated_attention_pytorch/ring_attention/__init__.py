"""One sequence over many ranks: exact dilated attention on contiguous shards, with exact gradients.

Everything is loaded when first asked for: the configuration and the abstract base need no torch.distributed.
"""

from __future__ import annotations

import importlib
import pkgutil  # 0.4.0: goes with _old
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dilated_attention_pytorch.ring_attention.base import BaseRingAttention
    from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
    from dilated_attention_pytorch.ring_attention.distributed import RingDistributedDilatedAttention
    from dilated_attention_pytorch.ring_attention.forecast import balanced_bounds
    from dilated_attention_pytorch.ring_attention.plan import RingPlan
    from dilated_attention_pytorch.ring_attention.production import RingDilatedAttention
    from dilated_attention_pytorch.ring_attention.utils.buffers import exchange_pool
    from dilated_attention_pytorch.ring_attention.utils.communication import RingError, counting
    from dilated_attention_pytorch.ring_attention.utils.lse import LSEAccumulator
    from dilated_attention_pytorch.ring_attention.variants.hilbert import (
        HilbertMixin,
        HilbertRingAttention,
        RingDilatedAttentionHilbert,
    )

__path__ = pkgutil.extend_path(__path__, __name__)  # 0.4.0: goes with _old
_MODULES = {
    "base": "BaseRingAttention",
    "config": "RingAttentionConfig",
    "distributed": "RingDistributedDilatedAttention",
    "forecast": "balanced_bounds",
    "plan": "RingPlan",
    "production": "RingDilatedAttention",
    "utils.buffers": "exchange_pool",
    "utils.communication": "RingError counting",
    "utils.lse": "LSEAccumulator",
    "variants.hilbert": "HilbertMixin HilbertRingAttention RingDilatedAttentionHilbert",
}
_LAZY = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "BaseRingAttention",
    "HilbertMixin",
    "HilbertRingAttention",
    "LSEAccumulator",
    "RingAttentionConfig",
    "RingDilatedAttention",
    "RingDilatedAttentionHilbert",
    "RingDistributedDilatedAttention",
    "RingError",
    "RingPlan",
    "balanced_bounds",
    "counting",
    "exchange_pool",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
