"""0.2's ring classes without parameters: `RingDilatedAttention` with their arguments.

On several ranks each of them took the *whole* sequence on every rank and returned all of it. So do these: without a
`process_group` every rank computes what it is given, exactly. Shards go into `RingDilatedAttention` with a group.
"""

from __future__ import annotations

from typing import Any

from dilated_attention_pytorch._old.attention import OldAttention
from dilated_attention_pytorch._old.calls import RING, RING_CONFIG, OldCall, with_config
from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
from dilated_attention_pytorch.ring_attention.production import RingDilatedAttention

_FIRST = "segment_lengths dilation_rates dropout"
_POOL = f"{_FIRST} ring_size device dtype enable_memory_pool enable_profiling lightweight_pool use_pattern_cache"


def ring_call(name: str, order: str) -> OldCall:
    """The call of an old ring, which took the configuration's arguments by name."""
    config = RING_CONFIG.call
    return config.named(name, order)._replace(keywords=(*config.order, *config.keywords))


class OldRingArguments(OldAttention):
    """`OldAttention` for rings, which take a configuration: a new one stands for itself."""

    def construction(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The new class's arguments."""
        group = {name: kwargs.pop(name) for name in ("process_group", "mesh_dim") if name in kwargs}
        config = kwargs.pop("config", None)
        if config is None and args and isinstance(args[0], RingAttentionConfig):
            config, args = args[0], args[1:]
        if config is None:
            return {**with_config(self.call.arguments(args, kwargs)), **group}
        if args or kwargs:
            raise TypeError(f"expected nothing beside the config of {self.call.name}, got {[*args, *kwargs]}")
        return {"config": config, **group}


class _OldRing(OldRingArguments, RingDilatedAttention):  # type: ignore[misc]
    pass


class RingDilatedAttention01(_OldRing):
    """The first `RingDilatedAttention`."""

    call = ring_call("RingDilatedAttention", f"{_FIRST} use_tf32 block_size ring_size use_checkpointing device dtype")


class RingDilatedAttentionProduction(_OldRing):
    """It takes 0.2's `RingAttentionConfig`."""

    call = ring_call("RingDilatedAttentionProduction", "")


class RingDilatedAttentionHybrid(_OldRing):
    call = ring_call(
        "RingDilatedAttentionHybrid", f"{_POOL} memory_pool_threshold_mb use_flash_attention use_bucketed"
    )  # fmt: skip


class RingDilatedAttentionTrue(_OldRing):
    call = ring_call("RingDilatedAttentionTrue", f"{_FIRST} bucket_size ring_size device dtype")


class TrueRingDilatedAttention(_OldRing):
    call = ring_call("TrueRingDilatedAttention", f"{_FIRST} ring_size chunk_size_kv device dtype")


class SimulatedRingDilatedAttention(_OldRing):
    call = ring_call("SimulatedRingDilatedAttention", f"{_FIRST} ring_size chunk_k_v device dtype")


class RingDilatedAttentionV2(_OldRing):
    call = ring_call("RingDilatedAttentionV2", _POOL)


class RingDilatedAttentionV2Collective(_OldRing):
    call = ring_call("RingDilatedAttentionV2Collective", " ".join(RING.call.order))


class RingDilatedAttentionV2Flash(_OldRing):
    call = ring_call("RingDilatedAttentionV2Flash", " ".join(RING.call.order))


class RingDilatedAttentionV3(_OldRing):
    call = ring_call("RingDilatedAttentionV3", f"{_POOL} cache_on_gpu")


def create_production_ring_attention(
    segment_lengths: list[int], dilation_rates: list[int], **kwargs: Any
) -> RingDilatedAttentionProduction:
    """0.2's factory: further arguments are those of its `RingAttentionConfig`."""
    return RingDilatedAttentionProduction(segment_lengths, dilation_rates, **kwargs)
