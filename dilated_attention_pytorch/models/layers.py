"""Pre-LN layers with MAGNETO's sub-LN, named as in the official checkpoints, and a stack of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch.core.positions import Rotation
from dilated_attention_pytorch.core.validation import check_dense, check_multiplicand
from dilated_attention_pytorch.functional import in_autocast_dtype
from dilated_attention_pytorch.models.base import TensorOptions
from dilated_attention_pytorch.models.config import LongNetConfig
from dilated_attention_pytorch.models.recompute import gelu_norm_linear
from dilated_attention_pytorch.modules import KeyValueStore, MultiheadDilatedAttention
from dilated_attention_pytorch.types import BackendName


class RowMasks(TypedDict, total=False):
    """Which rows of a batch are real and where its sequences begin; keyword arguments of all forwards.

    Attributes:
        key_padding_mask: bool `(B, N)`, True = real.
        row_start: int `(B,)`, first real position of each left-padded row.
        cu_seqlens: int `(sequences + 1,)`, bounds of packed sequences.
    """

    key_padding_mask: Tensor | None
    row_start: Tensor | None
    cu_seqlens: Tensor | None


class FeedForward(nn.Module):
    """`fc2(LayerNorm(activation(fc1(x))))`: the feed-forward network with sub-LN (arXiv 2210.06423, figure 2).

    Args:
        config: sizes, activation and epsilon.
        gamma: gain of the xavier-normal start of both weights.
        recompute: with GELU, keep only `fc1`'s output for the backward and compute what follows from it again; a third
            of the memory, first derivatives only.
        factory: `device` and `dtype` of the parameters.
    """

    def __init__(
        self, config: LongNetConfig, gamma: float, *, recompute: bool = False, **factory: Unpack[TensorOptions]
    ) -> None:
        super().__init__()
        width, inner = config.d_model, config.dim_feedforward
        self.fc1 = nn.Linear(width, inner, **factory)
        self.ffn_layernorm = nn.LayerNorm(inner, eps=config.layer_norm_eps, **factory)
        self.fc2 = nn.Linear(inner, width, **factory)
        self.activation = F.relu if config.activation == "relu" else F.gelu
        self.recompute = recompute and config.activation == "gelu"
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_normal_(linear.weight, gain=gamma)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d_model)` to the same."""
        h = self.fc1(x)
        if self.recompute:
            return gelu_norm_linear(h, self.ffn_layernorm, self.fc2)
        out: Tensor = self.fc2(self.ffn_layernorm(self.activation(h)))
        return out


class Layer(nn.Module):
    """Self-attention, cross-attention where asked for, feed-forward; each is added to its input.

    Args:
        config: sizes and options.
        gamma: MAGNETO's gain. Cross-attention keeps 1, as in the official code.
        cross_attention: whether the layer looks at a memory too.
        recompute: as in `FeedForward`.
        backend: of the attention.
        factory: `device` and `dtype` of the parameters.
    """

    def __init__(
        self,
        config: LongNetConfig,
        gamma: float,
        *,
        cross_attention: bool = False,
        recompute: bool = False,
        backend: BackendName = "auto",
        **factory: Unpack[TensorOptions],
    ) -> None:
        super().__init__()

        def attention(gain: float) -> MultiheadDilatedAttention:
            return MultiheadDilatedAttention(
                config.d_model,
                config.nhead,
                config.attention_dropout,
                segment_lengths=config.segment_lengths,
                dilation_rates=config.dilation_rates,
                num_kv_heads=config.num_kv_heads,
                layer_norm_eps=config.layer_norm_eps,
                gamma_init=gain,
                positions=config.positions,
                rotary_base=config.rotary_base,
                scale_base=config.scale_base,
                offsets=config.offsets,
                mixing_gradient=config.mixing_gradient,
                padding=config.padding,
                backend=backend,
                **factory,
            )

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, **factory)

        self.self_attn = attention(gamma)
        self.self_attn_layer_norm = norm()
        self.encoder_attn = attention(1.0) if cross_attention else None
        self.encoder_attn_layer_norm = norm() if cross_attention else None
        self.ffn = FeedForward(config, gamma, recompute=recompute, **factory)
        self.final_layer_norm = norm()
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        is_causal: bool,
        rotation: Rotation | None = None,
        cache: KeyValueStore | None = None,
        scales: Tensor | None = None,
        **rows: Unpack[RowMasks],
    ) -> Tensor:
        """`(B, N, d_model)` to the same.

        Args:
            x: `(B, N, d_model)`, or `(total, d_model)` with `cu_seqlens`.
            memory: like x, for the cross-attention.
            is_causal: hide later positions, of x and of the memory.
            rotation: shared by all layers.
            cache: this layer's.
            scales: `(2, ...)`, factors that broadcast to x, on the outputs of self-attention and feed-forward.
            rows: see `RowMasks`.
        """
        check_multiplicand("x", x, self.self_attn.q_proj, self.self_attn_layer_norm)
        # Under autocast the norm's output is fp32: cast once, or each of the three projections keeps a cast of its own.
        (h,) = in_autocast_dtype(self.self_attn_layer_norm(x))
        h, _ = self.self_attn(h, h, h, is_causal=is_causal, rotation=rotation, cache=cache, **rows)
        x = x + self._drop(h, None if scales is None else scales[0])
        if self.encoder_attn is not None and self.encoder_attn_layer_norm is not None:
            h = self.encoder_attn_layer_norm(x)
            h, _ = self.encoder_attn(h, memory, memory, is_causal=is_causal, rotation=rotation, **rows)
            x = x + self._drop(h)
        return x + self._drop(self.ffn(self.final_layer_norm(x)), None if scales is None else scales[1])

    def _drop(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = F.dropout(x, self.dropout) if self.dropout > 0.0 and self.training else x
        return x if scale is None else x * scale.to(x.dtype)


def stochastic_depth(rate: float, depth: int, batch: int, device: torch.device) -> Tensor:
    """Factors `(depth, 2, batch)` on the outputs of each layer's two sublayers per sequence (arXiv 1603.09382).

    Each is 0 with a probability that rises linearly from 0 at the first layer to `rate` at the last, otherwise the
    inverse of keeping it.
    """
    keep = 1.0 - torch.linspace(0.0, rate, depth, device=device)[:, None, None]
    return torch.bernoulli(keep.expand(-1, 2, batch)) / keep


class LayerStack(nn.Module):
    """Layers one after the other, and a LayerNorm at the end.

    Args:
        config: sizes and options.
        num_layers: how many.
        gamma: MAGNETO's gain.
        factory: `device` and `dtype` of the parameters.
        options: further arguments of `Layer`.
    """

    def __init__(
        self, config: LongNetConfig, num_layers: int, gamma: float, factory: TensorOptions, **options: Any
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, gamma, **options, **factory) for _ in range(num_layers))
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, **factory)

    def forward(self, x: Tensor, memory: Tensor | None = None, **options: Any) -> Tensor:
        """The last of `states` after the final LayerNorm; arguments are those of `states`."""
        out: Tensor = self.layer_norm(deque(self.states(x, memory, **options), maxlen=1).pop())
        return out

    def states(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        is_causal: bool,
        start: int = 0,
        caches: Sequence[KeyValueStore] | None = None,
        scales: Tensor | None = None,
        gradient_checkpointing: bool = False,
        **rows: Unpack[RowMasks],
    ) -> Iterator[Tensor]:
        """The output of each layer, `(B, N, d_model)`, one after the other, without the final LayerNorm.

        Args:
            x: `(B, N, d_model)`, or `(total, d_model)` with `cu_seqlens`.
            memory: like x, for the cross-attention.
            is_causal: hide later positions.
            start: position of the first row.
            caches: one per layer.
            scales: `(layers, 2, ...)`, a pair for each layer as in `Layer.forward`.
            gradient_checkpointing: compute each layer again in the backward instead of keeping its activations.
            rows: see `RowMasks`.
        """
        check_dense("x", x)
        rank, width = 2 if rows.get("cu_seqlens") is not None else 3, self.layer_norm.normalized_shape[0]
        if x.dim() != rank or x.shape[-1] != width:
            layout = f"(total, {width}) with cu_seqlens" if rank == 2 else f"(B, N, {width})"
            raise ValueError(f"expected x of shape {layout}, got {tuple(x.shape)}")
        # Rows stand at the same positions in every layer, so the tables of cosines are made once.
        first: MultiheadDilatedAttention = self.layers[0].self_attn  # type: ignore[assignment]
        rotation = first.rotation(x, start=start, row_start=rows.get("row_start"), cu_seqlens=rows.get("cu_seqlens"))
        again = gradient_checkpointing and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            run = partial(
                layer,
                is_causal=is_causal,
                rotation=rotation,
                cache=None if caches is None else caches[i],
                scales=None if scales is None else scales[i],
                **rows,
            )
            x = checkpoint(run, x, memory, use_reentrant=False) if again else run(x, memory)
            yield x
