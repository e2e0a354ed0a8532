"""0.2's rings: those of today with the old arguments.

On several ranks each of them took the *whole* sequence on every rank and returned all of it. So do these: without a
`process_group` every rank computes what it is given, exactly. Shards go into `RingDilatedAttention` with a group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch._old.attention import OldArguments, OldAttention, forward_arguments
from dilated_attention_pytorch._old.calls import RING, RING_CONFIG, OldCall, old_call, with_config
from dilated_attention_pytorch.core.messages import quoted
from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
from dilated_attention_pytorch.ring_attention.distributed import RingDistributedDilatedAttention
from dilated_attention_pytorch.ring_attention.production import RingDilatedAttention
from dilated_attention_pytorch.ring_attention.variants.hilbert import HilbertRingAttention, RingDilatedAttentionHilbert

_FIRST = "segment_lengths dilation_rates dropout"
_START = f"{_FIRST} ring_size device dtype"
_POOL = f"{_START} enable_memory_pool enable_profiling lightweight_pool use_pattern_cache"
_HILBERT = f"{_START} enable_memory_pool enable_profiling use_pattern_cache use_flash_attention"


def ring_call(name: str, order: str = "") -> OldCall:
    """The call of an old ring, which took the configuration's arguments by name too."""
    config = RING_CONFIG.call
    return config.named(name, order)._replace(keywords=(*config.order, *config.keywords))


class _OldRingArguments(OldAttention):
    def construction(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        group: dict[str, Any] = {name: kwargs.pop(name) for name in ("process_group", "mesh_dim") if name in kwargs}
        config = kwargs.pop("config", None)
        if config is None and args and isinstance(args[0], RingAttentionConfig):
            config, args = args[0], args[1:]
        if config is None:
            return {**with_config(self.call.arguments(args, kwargs)), **group}
        if args or kwargs:
            raise TypeError(f"expected nothing beside the config of {self.call.name}, got {quoted([*args, *kwargs])}")
        return {"config": config, **group}


class OldRing(_OldRingArguments, RingDilatedAttention):  # type: ignore[misc]
    pass


def _ring(name: str, order: str = "") -> type[OldRing]:
    """An old ring without parameters: they differ in the order of their arguments alone."""
    return type(name, (OldRing,), {"call": ring_call(name.removesuffix("01"), order), "__module__": __name__})


RingDilatedAttention01 = _ring(
    "RingDilatedAttention01", f"{_FIRST} use_tf32 block_size ring_size use_checkpointing device dtype"
)
RingDilatedAttentionProduction = _ring("RingDilatedAttentionProduction")
RingDilatedAttentionHybrid = _ring(
    "RingDilatedAttentionHybrid", f"{_POOL} memory_pool_threshold_mb use_flash_attention use_bucketed"
)
RingDilatedAttentionTrue = _ring("RingDilatedAttentionTrue", f"{_FIRST} bucket_size ring_size device dtype")
TrueRingDilatedAttention = _ring("TrueRingDilatedAttention", f"{_FIRST} ring_size chunk_size_kv device dtype")
SimulatedRingDilatedAttention = _ring("SimulatedRingDilatedAttention", f"{_FIRST} ring_size chunk_k_v device dtype")
RingDilatedAttentionV2 = _ring("RingDilatedAttentionV2", _POOL)
RingDilatedAttentionV2Collective = _ring("RingDilatedAttentionV2Collective", " ".join(RING.call.order))
RingDilatedAttentionV2Flash = _ring("RingDilatedAttentionV2Flash", " ".join(RING.call.order))
RingDilatedAttentionV3 = _ring("RingDilatedAttentionV3", f"{_POOL} cache_on_gpu")


def create_production_ring_attention(segment_lengths: list[int], dilation_rates: list[int], **kwargs: Any) -> OldRing:
    """0.2's factory: further arguments are those of its `RingAttentionConfig`."""
    return RingDilatedAttentionProduction(segment_lengths, dilation_rates, **kwargs)


class _OldHilbertRing(_OldRingArguments, HilbertRingAttention):
    ordered = -1  # length of the sequence whose order is set

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        length = query.shape[1] * self.world_size if query.dim() == 4 else 0
        if length not in (0, self.ordered):
            # 0.2 laid any sequence out on the smallest square that holds it, row by row.
            side = math.isqrt(length - 1) + 1
            index = torch.arange(length, device="cpu")
            self.set_order(torch.stack((index // side, index % side), 1))
            self.ordered = length
        return super().forward(query, *args, **kwargs)


class RingDilatedAttentionHilbertOptimized(_OldHilbertRing, RingDilatedAttentionHilbert):  # type: ignore[misc]
    """It takes rows in their original order, as it did; its successor, the second base, takes them along the curve."""

    call = ring_call(
        "RingDilatedAttentionHilbertOptimized",
        f"{_HILBERT} hilbert_chunk_size cache_hilbert_mappings apply_hilbert_to_kv precompute_patterns "
        "overlap_communication",
    )


class RingDilatedAttentionHybridHilbert(_OldHilbertRing):
    call = ring_call(
        "RingDilatedAttentionHybridHilbert",
        f"{_HILBERT} precompute_patterns overlap_communication use_hilbert hilbert_chunk_size use_xformers "
        "attention_op",
    )


class _OldRingMultihead(OldArguments, RingDistributedDilatedAttention):
    """`forward` takes the whole sequence on every rank and returns a pair."""

    call = old_call(
        "RingDistributedDilatedAttention",
        "embed_dim num_heads segment_lengths dilation_rates dropout bias layer_norm layer_norm_eps gamma_init "
        "block_size ring_size use_checkpointing model_parallel sequence_parallel data_parallel use_deepspeed "
        "zero_stage cpu_offload nvme_offload use_8bit_optimizer use_gradient_compression activation_checkpointing "
        "communication_backend bucket_size overlap_communication enable_fault_tolerance checkpoint_interval "
        "auto_resume enable_monitoring profile_memory log_level use_tf32 use_flash_attention compile_model device "
        "dtype",
        kept="embed_dim num_heads segment_lengths dilation_rates dropout bias layer_norm layer_norm_eps gamma_init "
        "device dtype",
    )

    def construction(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        values = super().construction(args, kwargs)
        ring = {name: values.pop(name) for name in _FIRST.split() if name in values}
        return {**values, "config": RingAttentionConfig(**ring)}

    def attended(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """The new module attends a sequence over itself; the old ones had a query, a key and a value."""
        return self._leave(self.attention(*self._project(query, key, value), **options)), None


class RingDistributedDilatedAttention02(_OldRingMultihead):
    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, is_causal: bool = False,
        need_weights: bool = False, attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        return self.attended(**forward_arguments(query, key, value, attn_mask=attn_mask, is_causal=is_causal))


class RingMultiheadDilatedAttentionHybrid(_OldRingMultihead):
    call = _OldRingMultihead.call.named(
        "RingMultiheadDilatedAttentionHybrid",
        "embed_dim num_heads segment_lengths dilation_rates dropout bias add_bias_kv add_zero_attn kdim vdim "
        "batch_first device dtype ring_size enable_memory_pool use_pattern_cache use_flash_attention layer_norm "
        "gamma_init gate_fn gate_bias gate_temperature",
    )

    def construction(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = self.call.given(args, kwargs)
        width = given.get("embed_dim")
        # These changed what was computed, so they are refused where they ask for something, not ignored.
        allowed = {
            "add_bias_kv": (False,), "add_zero_attn": (False,), "kdim": (None, width), "vdim": (None, width),
            "batch_first": (True,), "gate_fn": (None,),
        }  # fmt: skip
        for name, values in allowed.items():
            if name in given and given[name] not in values:
                raise ValueError(
                    f"expected {name} to be {quoted(values[0])}, got {quoted(given[name])}: it has no successor"
                )
        return {"layer_norm": False, **super().construction(args, kwargs)}

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None,
        key_padding_mask: Tensor | None = None, need_weights: bool = False, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        call = forward_arguments(query, key, value, key_padding_mask, attn_mask=attn_mask, is_causal=is_causal)
        return self.attended(**call)


class RingMultiheadDilatedAttentionV3(RingMultiheadDilatedAttentionHybrid):
    call = _OldRingMultihead.call.named(
        "RingMultiheadDilatedAttentionV3",
        "embed_dim num_heads segment_lengths dilation_rates dropout bias batch_first device dtype bucket_size "
        "ring_size use_bucketed grad_checkpoint_buckets",
    )

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False
    ) -> Tensor:
        return super().forward(query, key, value, is_causal=is_causal)[0]


class TrueRingMultiheadDilatedAttention(RingMultiheadDilatedAttentionHybrid):
    call = _OldRingMultihead.call.named(
        "TrueRingMultiheadDilatedAttention",
        "embed_dim num_heads segment_lengths dilation_rates dropout bias add_bias_kv add_zero_attn kdim vdim "
        "batch_first device dtype bucket_size ring_size",
    )

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        return super().forward(query, key, value, is_causal=is_causal)
