"""What the multi-head modules share, on one device or on many: sizes, projections and MAGNETO's initialisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.positions import Rotation, rotate
from dilated_attention_pytorch.types import QKV


class Projections(nn.Module):
    """Projections around an attention, with sub-LN; parameters are named as in the official checkpoints."""

    def _set_sizes(self, embed_dim: int, num_heads: int, num_kv_heads: int | None, gamma_init: float) -> None:
        self.embed_dim = embed_dim = check.check_width("embed_dim", embed_dim)
        self.num_heads = num_heads = check.check_positive_int("num_heads", num_heads)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_heads = check.check_positive_int("num_kv_heads", kv_heads)
        if embed_dim % num_heads:
            raise ValueError(f"expected embed_dim to be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if num_heads % self.num_kv_heads:
            raise ValueError(f"expected num_heads to be a multiple of num_kv_heads, got {num_heads} and {kv_heads}")
        self.head_dim = embed_dim // num_heads
        self.gamma_init = check.check_float("gamma_init", gamma_init)
        if not 0.0 <= self.gamma_init <= 1e9:  # beyond, the norm's variance overflows in fp32
            raise ValueError(f"expected gamma_init in [0, 1e9], got {gamma_init}")

    def _make_parameters(self, bias: bool, layer_norm: bool, layer_norm_eps: float, **place: Any) -> None:
        check.check_factory(place["device"], place["dtype"])
        check.check_bool("bias", bias)
        check.check_above_zero("layer_norm_eps", layer_norm_eps)
        check.check_bool("layer_norm", layer_norm)
        width, kv_width = self.embed_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=bias, **place)
        self.k_proj = nn.Linear(width, kv_width, bias=bias, **place)
        self.v_proj = nn.Linear(width, kv_width, bias=bias, **place)
        self.inner_attn_ln = nn.LayerNorm(width, eps=layer_norm_eps, **place) if layer_norm else None
        self.out_proj = nn.Linear(width, width, bias=bias, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MAGNETO's initialisation (arXiv 2210.06423, figure 2); seed ranks alike, or load the same weights."""
        gains = {self.q_proj: 1.0, self.k_proj: 1.0, self.v_proj: self.gamma_init, self.out_proj: self.gamma_init}
        for linear, gain in gains.items():
            nn.init.xavier_normal_(linear.weight, gain=gain)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.inner_attn_ln is not None:
            self.inner_attn_ln.reset_parameters()

    def _project(self, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None = None) -> QKV:
        """`(..., N, H, D)` and `(..., N, H_kv, D)`; queries and keys rotated."""
        q = self.q_proj(query).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(key).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(value).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if rotation is not None:
            q, k = rotate(q, rotation.q_cos, rotation.q_sin), rotate(k, rotation.k_cos, rotation.k_sin)
        return QKV(q, k, v)

    def _leave(self, out: Tensor) -> Tensor:
        """The heads of attention `(..., N, H, D)` put together again, `(..., N, embed_dim)`."""
        # Each position alone: in a ring nothing travels.
        out = out.flatten(-2)
        if self.inner_attn_ln is not None:
            out = self.inner_attn_ln(out)
        projected: Tensor = self.out_proj(out)
        return projected
