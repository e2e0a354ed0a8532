"""Exact dilated attention (LongNet, arXiv 2307.02486) for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# First: importing a submodule binds it here, and from the next lines on that name is the function.
from dilated_attention_pytorch import dilated_attention as _old_module  # noqa: F401  # isort: skip
from dilated_attention_pytorch._deprecated import BY_PLACE, load, old_name
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
        RingAttentionConfig,
        RingDilatedAttention,
        RingDistributedDilatedAttention,
    )
    from dilated_attention_pytorch.streaming import dilated_attention_streamed

# `import dilated_attention_pytorch.dilated_attention as m` gives the function too, whatever is imported first: Python
# takes the attribute. So the function has the names that the old module is asked for; what stands in for them warns.
for _row in BY_PLACE["dilated_attention"].values():
    setattr(dilated_attention, _row.name, load(_row))

__version__ = "0.3.0.dev0"

__all__ = [
    "AttentionOutput",
    "DilatedAttention",
    "DilatedPattern",
    "LongNet",
    "LongNetConfig",
    "LongNetEncoder",
    "LongNetLM",
    "LongViT",
    "LongViTConfig",
    "MultiheadDilatedAttention",
    "RingAttentionConfig",
    "RingDilatedAttention",
    "RingDistributedDilatedAttention",
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
_LAZY = dict.fromkeys(
    [
        "LongNet",
        "LongNetConfig",
        "LongNetEncoder",
        "LongNetLM",
        "LongViT",
        "LongViTConfig",
        "SlideEncoder",
        "SlideEncoderConfig",
    ],
    "dilated_attention_pytorch.models",
) | dict.fromkeys(
    ["RingAttentionConfig", "RingDilatedAttention", "RingDistributedDilatedAttention"],
    "dilated_attention_pytorch.ring_attention",
)
_LAZY["dilated_attention_streamed"] = "dilated_attention_pytorch.streaming"
_LAZY["UnifiedMemoryPool"] = "dilated_attention_pytorch.core.memory.unified_pool"


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    return old_name("", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
