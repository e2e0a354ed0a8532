"""0.2's factories and the configurations they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from dilated_attention_pytorch._deprecated import load
from dilated_attention_pytorch.core.messages import quoted

# The kinds that differed in speed and not in what they should have computed, and the ring.
_TYPES = ["auto", "standard", "improved", "distributed", "improved_distributed", "ring"]


@dataclass
class DilatedAttentionConfig:
    """0.2's configuration of attention."""

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    dropout: float = 0.0
    use_tf32: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    @property
    def num_groups(self) -> int:
        """The number of branches."""
        return len(self.segment_lengths)


@dataclass
class MultiheadConfig:
    """0.2's configuration of projections."""

    embed_dim: int
    num_heads: int
    bias: bool = True
    layer_norm: bool = True
    layer_norm_eps: float = 1e-5
    gamma_init: float = 1.0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.embed_dim // self.num_heads


def create_dilated_attention(
    attention_type: str = "auto",
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    **kwargs: Any,
) -> Any:
    """A `DilatedAttention`, or a `RingDilatedAttention` for `"ring"`."""
    pattern = _pattern(attention_type, segment_lengths, dilation_rates)
    if attention_type == "ring":
        return load("_old.rings:RingDilatedAttentionProduction")(**pattern, **kwargs)
    if "attention_dropout" in kwargs:
        kwargs["dropout"] = kwargs.pop("attention_dropout")
    return load("_old.attention:ImprovedDilatedAttention")(**pattern, **kwargs)


def create_multihead_dilated_attention(
    attention_type: str = "auto",
    embed_dim: int = 768,
    num_heads: int = 12,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    multihead_config: MultiheadConfig | None = None,
    attention_config: DilatedAttentionConfig | None = None,
    **kwargs: Any,
) -> Any:
    """A `MultiheadDilatedAttention`, or a `RingDistributedDilatedAttention` for `"ring"`."""
    pattern = _pattern(attention_type, segment_lengths, dilation_rates)
    values = {"embed_dim": embed_dim, "num_heads": num_heads, **pattern}
    for config in (attention_config, multihead_config):
        if config is not None:
            # What says nothing about the module is left out, so that it need not be ignored aloud.
            defaults = {field.name: field.default for field in fields(config)}
            values |= {name: value for name, value in asdict(config).items() if value != defaults[name]}
    values |= kwargs
    if attention_type == "ring":
        return load("_old.rings:RingMultiheadDilatedAttentionHybrid")(**{"layer_norm": True, **values})
    # "improved" alone returned a pair.
    kind = "ImprovedMultiheadDilatedAttention"
    if attention_type == "standard":
        kind = "MultiheadDilatedAttention02"
    elif attention_type.endswith("distributed"):
        kind = "DistributedImprovedMultiheadDilatedAttention"
    return load(f"_old.attention:{kind}")(**values)


def _pattern(kind: str, lengths: Sequence[int] | None, rates: Sequence[int] | None) -> dict[str, Any]:
    """The pattern's arguments by name, of a kind that exists."""
    if kind not in _TYPES:
        sparse = ": block-sparse attention is not dilated attention and has no successor"
        why = sparse if str(kind).startswith("block_sparse") else ""
        raise ValueError(f"expected attention_type to be one of {_TYPES}, got {quoted(kind)}{why}")
    lengths, rates = [2048, 4096, 8192] if lengths is None else lengths, [1, 2, 4] if rates is None else rates
    return {"segment_lengths": lengths, "dilation_rates": rates}
