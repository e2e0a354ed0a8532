"""0.2's ring classes without parameters: `RingDilatedAttention` with their arguments.

On several ranks each of them took the *whole* sequence on every rank and returned all of it. So do these: without a
`process_group` every rank computes what it is given, exactly. Shards go into `RingDilatedAttention` with a group.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from dilated_attention_pytorch._deprecated import OldCall
from dilated_attention_pytorch._old.attention import no_mask
from dilated_attention_pytorch.ring_attention.config import OLD_RING, RingAttentionConfig
from dilated_attention_pytorch.ring_attention.production import RingDilatedAttention

_START = ("segment_lengths", "dilation_rates", "dropout", "ring_size", "device", "dtype")
_POOL = ("enable_memory_pool", "enable_profiling", "lightweight_pool", "use_pattern_cache")


def construction(name: str, call: OldCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `RingDilatedAttention` for those of an old ring; a config stands for itself."""
    group: dict[str, Any] = {key: kwargs.pop(key) for key in ("process_group", "mesh_dim") if key in kwargs}
    config = kwargs.pop("config", None)
    if config is None and args and isinstance(args[0], RingAttentionConfig):
        config, args = args[0], args[1:]
    if config is None:
        config = RingAttentionConfig(**call.arguments(name, args, kwargs))
    elif args or kwargs:
        raise TypeError(f"expected nothing beside the config of {name}, got {[*args, *kwargs]}")
    return {"config": config, **group}


class _OldRing(RingDilatedAttention):
    old_order: ClassVar[tuple[str, ...]] = _START

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        call = OLD_RING._replace(order=self.old_order, keywords=(*OLD_RING.order, *OLD_RING.keywords))
        super().__init__(**construction(type(self).__name__, call, args, kwargs))

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
        **new: Any,
    ) -> Tensor:
        """`RingDilatedAttention.forward`; see `no_mask`."""
        no_mask("attention_mask", attention_mask)
        return super().forward(query, key, value, is_causal, **new)


class RingDilatedAttention01(_OldRing):
    """The first `RingDilatedAttention`."""

    old_order = ("segment_lengths", "dilation_rates", "dropout", "use_tf32", "block_size", "ring_size",
             "use_checkpointing", "device", "dtype")  # fmt: skip


class RingDilatedAttentionProduction(_OldRing):
    """0.2's name; takes 0.2's `RingAttentionConfig`."""

    old_order = OLD_RING.order


class RingDilatedAttentionHybrid(_OldRing):
    """0.2's name."""

    old_order = (*_START, *_POOL, "memory_pool_threshold_mb", "use_flash_attention", "use_bucketed")


class RingDilatedAttentionTrue(_OldRing):
    """0.2's name."""

    old_order = ("segment_lengths", "dilation_rates", "dropout", "bucket_size", "ring_size", "device", "dtype")


class TrueRingDilatedAttention(_OldRing):
    """0.2's name."""

    old_order = ("segment_lengths", "dilation_rates", "dropout", "ring_size", "chunk_size_kv", "device", "dtype")


class SimulatedRingDilatedAttention(_OldRing):
    """0.2's name."""

    old_order = ("segment_lengths", "dilation_rates", "dropout", "ring_size", "chunk_k_v", "device", "dtype")


class RingDilatedAttentionV2(_OldRing):
    """0.2's name."""

    old_order = (*_START, *_POOL)


class RingDilatedAttentionV2Collective(_OldRing):
    """0.2's name."""

    old_order = (*_START, *_POOL, "memory_pool_threshold_mb", "use_flash_attention", "flash_chunk_size")


class RingDilatedAttentionV2Flash(_OldRing):
    """0.2's name."""

    old_order = RingDilatedAttentionV2Collective.old_order


class RingDilatedAttentionV3(_OldRing):
    """0.2's name."""

    old_order = (*_START, *_POOL, "cache_on_gpu")


def create_production_ring_attention(
    segment_lengths: list[int], dilation_rates: list[int], **kwargs: Any
) -> RingDilatedAttentionProduction:
    """0.2's factory: further arguments are those of its `RingAttentionConfig`."""
    return RingDilatedAttentionProduction(segment_lengths, dilation_rates, **kwargs)
