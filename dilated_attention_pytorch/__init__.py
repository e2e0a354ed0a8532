"""Exact dilated attention (LongNet, arXiv 2307.02486) for PyTorch."""

from dilated_attention_pytorch.core.merge import merge_attention
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.functional import dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.types import AttentionOutput

__version__ = "0.3.0.dev0"

__all__ = [
    "AttentionOutput",
    "DilatedPattern",
    "dilated_attention",
    "dilated_attention_with_lse",
    "merge_attention",
]
