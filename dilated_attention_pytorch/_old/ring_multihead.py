"""0.2's multi-head ring classes: `RingDistributedDilatedAttention` with their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dilated_attention_pytorch._deprecated import OldCall
from dilated_attention_pytorch._old.attention import forward_arguments
from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
from dilated_attention_pytorch.ring_attention.distributed import RingDistributedDilatedAttention

_KEPT = ("embed_dim", "num_heads", "segment_lengths", "dilation_rates", "dropout", "bias", "layer_norm",
         "layer_norm_eps", "gamma_init", "device", "dtype")  # fmt: skip
_HYBRID = OldCall(
    ("embed_dim", "num_heads", "segment_lengths", "dilation_rates", "dropout", "bias", "add_bias_kv", "add_zero_attn",
     "kdim", "vdim", "batch_first", "device", "dtype", "ring_size", "enable_memory_pool", "use_pattern_cache",
     "use_flash_attention", "layer_norm", "gamma_init", "gate_fn", "gate_bias", "gate_temperature"),
    {name: name for name in _KEPT},
)  # fmt: skip
_DISTRIBUTED = OldCall(
    ("embed_dim", "num_heads", "segment_lengths", "dilation_rates", "dropout", "bias", "layer_norm", "layer_norm_eps",
     "gamma_init", "block_size", "ring_size", "use_checkpointing", "model_parallel", "sequence_parallel",
     "data_parallel", "use_deepspeed", "zero_stage", "cpu_offload", "nvme_offload", "use_8bit_optimizer",
     "use_gradient_compression", "activation_checkpointing", "communication_backend", "bucket_size",
     "overlap_communication", "enable_fault_tolerance", "checkpoint_interval", "auto_resume", "enable_monitoring",
     "profile_memory", "log_level", "use_tf32", "use_flash_attention", "compile_model", "device", "dtype"),
    {name: name for name in _KEPT},
)  # fmt: skip


class RingMultiheadDilatedAttentionHybrid(RingDistributedDilatedAttention):
    """0.2's name; `forward` takes the whole sequence on every rank and returns a pair."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values, _ = _HYBRID.translate("RingMultiheadDilatedAttentionHybrid", args, kwargs)
        given = dict(zip(_HYBRID.order, args, strict=False)) | kwargs
        # These changed what was computed, so they are refused where they ask for something, not ignored.
        for name, allowed in (
            ("add_bias_kv", (False,)),
            ("add_zero_attn", (False,)),
            ("kdim", (None, values.get("embed_dim"))),
            ("vdim", (None, values.get("embed_dim"))),
            ("batch_first", (True,)),
            ("gate_fn", (None,)),
        ):
            if name in given and given[name] not in allowed:
                raise ValueError(f"expected {name} to be {allowed[0]!r}, got {given[name]!r}: it has no successor")
        arguments = _HYBRID.arguments("RingMultiheadDilatedAttentionHybrid", args, kwargs)
        super().__init__(**_with_config({"layer_norm": False, **arguments}))

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention of query over key and value, with a `key_padding_mask` that is True at padding."""
        return _attend(self, forward_arguments(query, key, value, key_padding_mask, attn_mask, is_causal)), None


class RingDistributedDilatedAttention02(RingDistributedDilatedAttention):
    """`dilated_attention_pytorch.ring_distributed_dilated_attention.RingDistributedDilatedAttention`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**_with_config(_DISTRIBUTED.arguments("RingDistributedDilatedAttention", args, kwargs)))

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        is_causal: bool = False,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attention of query over key and value."""
        return _attend(self, forward_arguments(query, key, value, None, attn_mask, is_causal)), None


def _with_config(values: dict[str, Any]) -> dict[str, Any]:
    ring = {name: values.pop(name) for name in ("segment_lengths", "dilation_rates", "dropout") if name in values}
    return {**values, "config": RingAttentionConfig(**ring)}


def _attend(module: RingDistributedDilatedAttention, call: dict[str, Any]) -> Tensor:
    """The new module attends a sequence over itself; the old ones had a query, a key and a value."""
    heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (
        projection(call[name]).unflatten(-1, (h, module.head_dim))
        for projection, name, h in zip(projections, ("query", "key", "value"), heads, strict=True)
    )
    out = module.attention(q, k, v, call["is_causal"], call["key_padding_mask"]).flatten(-2)
    if module.inner_attn_ln is not None:
        out = module.inner_attn_ln(out)
    projected: Tensor = module.out_proj(out)
    return projected
