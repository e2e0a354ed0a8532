"""The multi-head module over ring attention: projections, sub-LN, and the exchange as one autograd-aware op."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.positions import Rotation, rotate
from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
from dilated_attention_pytorch.ring_attention.production import RingDilatedAttention


class RingDistributedDilatedAttention(nn.Module):
    """`MultiheadDilatedAttention` whose sequence is sharded over ranks.

    Parameters have the names and the initialisation of `MultiheadDilatedAttention` (MAGNETO, arXiv 2210.06423), so
    state dicts fit both. Projections and LayerNorm act on each position alone; only attention communicates, through one
    op. FSDP2 (`fully_shard`) wraps it like any module, over the same ranks or over another dimension of the mesh. Each
    rank's parameter gradients are those of its shard's positions: sum them over the context ranks, as FSDP2 does (it
    averages: scale the loss by the number of context ranks where it is a mean over the whole sequence).

    Args:
        embed_dim: width of inputs and outputs.
        num_heads: H, a divisor of embed_dim.
        config: of the ring; its `dropout` is of attention weights.
        process_group: as in `RingDilatedAttention`.
        mesh_dim: as in `RingDilatedAttention`.
        num_kv_heads: H_kv, a divisor of num_heads; num_heads by default.
        bias: whether the projections have one.
        layer_norm: whether `inner_attn_ln` exists.
        layer_norm_eps: its epsilon.
        gamma_init: MAGNETO's gain.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: sizes that do not divide.

    Example:
        >>> from dilated_attention_pytorch.ring_attention import RingAttentionConfig, RingDistributedDilatedAttention
        >>> config = RingAttentionConfig(segment_lengths=[128, 512], dilation_rates=[1, 4])
        >>> attention = RingDistributedDilatedAttention(64, 4, config)
        >>> attention(torch.randn(2, 1000, 64), is_causal=True).shape
        torch.Size([2, 1000, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        config: RingAttentionConfig,
        process_group: ProcessGroup | DeviceMesh | None = None,
        *,
        mesh_dim: str | None = None,
        num_kv_heads: int | None = None,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check.check_positive_int("embed_dim", embed_dim)
        self.num_heads = check.check_positive_int("num_heads", num_heads)
        self.num_kv_heads = (
            num_heads if num_kv_heads is None else check.check_positive_int("num_kv_heads", num_kv_heads)
        )
        if embed_dim % num_heads or num_heads % self.num_kv_heads:
            raise ValueError(
                "expected embed_dim to be a multiple of num_heads and num_heads one of num_kv_heads, got "
                f"{embed_dim}, {num_heads} and {self.num_kv_heads}"
            )
        self.head_dim = embed_dim // num_heads
        self.gamma_init = gamma_init
        self.attention = RingDilatedAttention(config, process_group, mesh_dim=mesh_dim)
        kv_dim = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.inner_attn_ln = (
            nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype) if layer_norm else None
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MAGNETO's initialisation (arXiv 2210.06423, figure 2); seed the ranks alike, or load the same weights."""
        gains = (self.q_proj, 1.0), (self.k_proj, 1.0), (self.v_proj, self.gamma_init), (self.out_proj, self.gamma_init)
        for linear, gain in gains:
            nn.init.xavier_normal_(linear.weight, gain=gain)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.inner_attn_ln is not None:
            self.inner_attn_ln.reset_parameters()

    def forward(
        self,
        x: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        *,
        rotation: Rotation | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Self-attention of this rank's positions over the whole sequence.

        Args:
            x: `(B, n, embed_dim)`, this rank's shard.
            is_causal: hide later keys.
            key_padding_mask: bool `(B, n)`, True = real.
            rotation: of this shard's positions, from `RotaryPositions`: they start where the shard does.
            seed: of the dropout mask.

        Returns:
            `(B, n, embed_dim)`.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"expected x of shape (B, n, {self.embed_dim}), got {tuple(x.shape)}")
        # (B, n, H, D) and (B, n, H_kv, D)
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if rotation is not None:
            q, k = rotate(q, rotation.q_cos, rotation.q_sin), rotate(k, rotation.k_cos, rotation.k_sin)
        # (B, n, embed_dim)
        out = self.attention(q, k, v, is_causal, key_padding_mask, seed=seed).flatten(-2)
        # Each position alone from here on: nothing travels.
        if self.inner_attn_ln is not None:
            out = self.inner_attn_ln(out)
        projected: Tensor = self.out_proj(out)
        return projected

    @override
    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}"
