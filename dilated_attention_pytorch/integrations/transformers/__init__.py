"""Hugging Face transformers: `attn_implementation="dilated"` for its models, and LongNet among its Auto classes.

    from dilated_attention_pytorch.integrations.transformers import register

    register()
    config = LlamaConfig(dilated_segment_lengths=[2048, 8192], dilated_dilation_rates=[1, 4])
    model = LlamaForCausalLM._from_config(config, attn_implementation="dilated")

One place decides what a layer computes: the form of the mask that the model makes for it (`masks.py`). Layers with a
mask of their own (windows, chunks, prefixes) and cross-attention stay as they are, with sdpa.
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "expected transformers 5 or later, which this module is for, found none: "
        "pip install 'dilated-attention-pytorch[hf]'"
    ) from error

if int(_transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"expected transformers 5 or later, which this module is for, found {_transformers.__version__}: "
        "pip install 'dilated-attention-pytorch[hf]'"
    )

from dilated_attention_pytorch.integrations.longnet import (
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetHFConfig,
)
from dilated_attention_pytorch.integrations.transformers.bounded import bounded_cache
from dilated_attention_pytorch.integrations.transformers.layers import attention
from dilated_attention_pytorch.integrations.transformers.masks import mask
from dilated_attention_pytorch.integrations.transformers.registry import register
from dilated_attention_pytorch.integrations.transformers.sharding import ShardingCollator
from dilated_attention_pytorch.integrations.transformers.switch import use_dilated_attention

__all__ = [
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForSequenceClassification",
    "LongNetHFConfig",
    "ShardingCollator",
    "attention",
    "bounded_cache",
    "mask",
    "register",
    "use_dilated_attention",
]
