"""0.1's language model and layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch._deprecated import warn_once
from dilated_attention_pytorch.models.config import LongNetConfig
from dilated_attention_pytorch.models.layers import Layer
from dilated_attention_pytorch.models.longnet import LongNetLM, activation_name


class LongNetLM01(LongNetLM):
    """`dilated_attention_pytorch.long_net.LongNetLM`: a decoder alone, where 0.1 had an encoder in front of it."""

    def __init__(
        self,
        num_tokens: int,
        d_model: int = 768,
        nhead: int = 12,
        num_encoder_layers: int | None = None,
        num_decoder_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768),
        dilation_rates: Sequence[int] = (1, 2, 4, 6, 12),
        dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_encoder_layers is not None:
            warn_once(
                "LongNetLM()", "LongNetLM ignores num_encoder_layers: since 0.3 a language model is a decoder alone"
            )
        super().__init__(
            vocab_size=num_tokens,
            d_model=d_model,
            nhead=nhead,
            num_decoder_layers=num_decoder_layers,
            dim_feedforward=dim_feedforward,
            segment_lengths=tuple(segment_lengths),
            dilation_rates=tuple(dilation_rates),
            dropout=dropout,
            activation=activation_name(activation),
            layer_norm_eps=layer_norm_eps,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, is_causal: bool = True, **new: Any) -> Tensor:  # type: ignore[override]
        """`LongNetLM.forward`; without `is_causal` every position sees later ones, as in a masked language model."""
        if is_causal:
            return super().forward(x, **new)
        if new:
            raise ValueError(f"expected nothing beside is_causal=False, got {sorted(new)}")
        self._check(x, False)
        embedded = self.embed_tokens(x) * math.sqrt(self.config.d_model)
        return self.logits(self.decoder(F.dropout(embedded, self.config.dropout, self.training), is_causal=False))


class _OldLayer(Layer):
    cross = False

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = LongNetConfig(
            d_model=d_model,
            nhead=nhead,
            segment_lengths=tuple(segment_lengths),
            dilation_rates=tuple(dilation_rates),
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            activation=activation_name(activation),
            layer_norm_eps=layer_norm_eps,
            positions=None,
        )
        super().__init__(config, gamma_init, cross_attention=self.cross, device=device, dtype=dtype)


class DilatedTransformerEncoderLayer(_OldLayer):
    """0.1's name."""

    def forward(self, src: Tensor, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        """`(B, N, d_model)` to the same."""
        return super().forward(src, is_causal=is_causal)


class DilatedTransformerDecoderLayer(_OldLayer):
    """0.1's name."""

    cross = True

    def forward(  # type: ignore[override]
        self, tgt: Tensor, memory: Tensor, tgt_is_causal: bool = False, memory_is_causal: bool = False
    ) -> Tensor:
        """`(B, N, d_model)` to the same; `Layer` has one flag for both attentions."""
        encoder_attn, encoder_norm = self.encoder_attn, self.encoder_attn_layer_norm
        assert encoder_attn is not None and isinstance(encoder_norm, nn.LayerNorm)
        h = self.self_attn_layer_norm(tgt)
        x = tgt + self._drop(self.self_attn(h, h, h, is_causal=tgt_is_causal)[0])
        h = encoder_norm(x)
        x = x + self._drop(encoder_attn(h, memory, memory, is_causal=memory_is_causal)[0])
        return x + self._drop(self.ffn(self.final_layer_norm(x)))
