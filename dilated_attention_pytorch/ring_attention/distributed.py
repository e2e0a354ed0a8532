"""The multi-head module over ring attention: projections, sub-LN, and the exchange as one autograd-aware op."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from dilated_attention_pytorch.core.positions import Rotation
from dilated_attention_pytorch.core.projections import Projections
from dilated_attention_pytorch.core.validation import check_instance
from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
from dilated_attention_pytorch.ring_attention.production import GroupOrMesh, RingDilatedAttention
from dilated_attention_pytorch.types import Seed


class RingDistributedDilatedAttention(Projections):
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
        process_group, mesh_dim: as in `RingDilatedAttention`.
        num_kv_heads, bias, layer_norm, layer_norm_eps, gamma_init, device, dtype: as in `MultiheadDilatedAttention`.

    Raises:
        ValueError: sizes that do not divide.

    Example:
        >>> from dilated_attention_pytorch.ring_attention import (
        ...     RingAttentionConfig, RingDistributedDilatedAttention,
        ... )
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
        process_group: GroupOrMesh = None,
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
        self._set_sizes(embed_dim, num_heads, num_kv_heads, gamma_init)
        check_instance("config", config, RingAttentionConfig)
        self.attention = RingDilatedAttention(config, process_group, mesh_dim=mesh_dim)
        self._make_parameters(bias, layer_norm, layer_norm_eps, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        *,
        rotation: Rotation | None = None,
        seed: Seed = None,
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
        q, k, v = self._project(x, x, x, rotation)
        return self._leave(self.attention(q, k, v, is_causal, key_padding_mask, seed=seed))

    @override
    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}"
