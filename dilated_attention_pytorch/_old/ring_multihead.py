"""0.2's multi-head ring classes: `RingDistributedDilatedAttention` with their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dilated_attention_pytorch._old.attention import OldArguments, forward_arguments
from dilated_attention_pytorch._old.calls import old_call
from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
from dilated_attention_pytorch.ring_attention.distributed import RingDistributedDilatedAttention

_KEPT = (
    "embed_dim num_heads segment_lengths dilation_rates dropout bias layer_norm layer_norm_eps gamma_init device dtype"
)


class _OldRingMultihead(OldArguments, RingDistributedDilatedAttention):
    def construction(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The new class's arguments, with those of the ring in its configuration."""
        values = super().construction(args, kwargs)
        ring = {name: values.pop(name) for name in ("segment_lengths", "dilation_rates", "dropout") if name in values}
        return {**values, "config": RingAttentionConfig(**ring)}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """The new module attends a sequence over itself; the old ones had a query, a key and a value."""
        q = self.q_proj(query).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(key).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(value).unflatten(-1, (self.num_kv_heads, self.head_dim))
        out = self.attention(q, k, v, **options).flatten(-2)
        if self.inner_attn_ln is not None:
            out = self.inner_attn_ln(out)
        projected: Tensor = self.out_proj(out)
        return projected


class RingMultiheadDilatedAttentionHybrid(_OldRingMultihead):
    """`forward` takes the whole sequence on every rank and returns a pair."""

    call = old_call(
        "RingMultiheadDilatedAttentionHybrid",
        "embed_dim num_heads segment_lengths dilation_rates dropout bias add_bias_kv add_zero_attn kdim vdim "
        "batch_first device dtype ring_size enable_memory_pool use_pattern_cache use_flash_attention layer_norm "
        "gamma_init gate_fn gate_bias gate_temperature",
        kept=_KEPT,
    )

    def construction(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Refuses what changed the numbers, where it asks for something; ignoring it would be silent."""
        given = self.call.given(args, kwargs)
        width = given.get("embed_dim")
        allowed = {
            "add_bias_kv": (False,), "add_zero_attn": (False,), "kdim": (None, width), "vdim": (None, width),
            "batch_first": (True,), "gate_fn": (None,),
        }  # fmt: skip
        for name, values in allowed.items():
            if name in given and given[name] not in values:
                raise ValueError(f"expected {name} to be {values[0]!r}, got {given[name]!r}: it has no successor")
        return {"layer_norm": False, **super().construction(args, kwargs)}

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
        return self.attend(**forward_arguments(query, key, value, key_padding_mask, attn_mask, is_causal)), None


class RingDistributedDilatedAttention02(_OldRingMultihead):
    """`dilated_attention_pytorch.ring_distributed_dilated_attention.RingDistributedDilatedAttention`."""

    call = old_call(
        "RingDistributedDilatedAttention",
        "embed_dim num_heads segment_lengths dilation_rates dropout bias layer_norm layer_norm_eps gamma_init "
        "block_size ring_size use_checkpointing model_parallel sequence_parallel data_parallel use_deepspeed "
        "zero_stage cpu_offload nvme_offload use_8bit_optimizer use_gradient_compression activation_checkpointing "
        "communication_backend bucket_size overlap_communication enable_fault_tolerance checkpoint_interval "
        "auto_resume enable_monitoring profile_memory log_level use_tf32 use_flash_attention compile_model device "
        "dtype",
        kept=_KEPT,
    )

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
        return self.attend(**forward_arguments(query, key, value, None, attn_mask, is_causal)), None
