"""0.1's language model and layers."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch._old.attention import OldArguments
from dilated_attention_pytorch._old.calls import LONGNET_ORDER, named_activation, old_call
from dilated_attention_pytorch.core.messages import quoted
from dilated_attention_pytorch.models.config import LongNetConfig
from dilated_attention_pytorch.models.layers import Layer
from dilated_attention_pytorch.models.longnet import LongNetLM


class LongNetLM01(OldArguments, LongNetLM):
    """`dilated_attention_pytorch.long_net.LongNetLM`: a decoder alone, where 0.1 had an encoder in front of it."""

    call = old_call(
        "LongNetLM",
        f"num_tokens {LONGNET_ORDER}",
        kept=f"num_tokens=vocab_size {LONGNET_ORDER.replace('num_encoder_layers ', '')}",
    )

    def construction(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return named_activation(super().construction(args, kwargs))

    def forward(self, x: Tensor, is_causal: bool = True, **new: Any) -> Tensor:  # type: ignore[override]
        """`LongNetLM.forward`; without `is_causal` every position sees later ones, as in a masked language model."""
        if is_causal:
            return super().forward(x, **new)
        if new:
            raise ValueError(f"expected nothing beside is_causal=False, got {quoted(sorted(new))}")
        self._check(x, False)
        embedded = self.embed_tokens(x) * math.sqrt(self.config.d_model)
        return self.logits(self.decoder(F.dropout(embedded, self.config.dropout, self.training), is_causal=False))


class _OldLayer(OldArguments, Layer):
    cross = False
    call = old_call(
        "",
        "d_model nhead segment_lengths dilation_rates dim_feedforward dropout activation layer_norm_eps gamma_init "
        "device dtype",
        kept="d_model nhead segment_lengths dilation_rates dim_feedforward dropout activation layer_norm_eps "
        "gamma_init=gamma device dtype",
    )

    def construction(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        defaults = {"gamma": 1.0, "dim_feedforward": 2048, "dropout": 0.1, "positions": None}
        values = defaults | named_activation(super().construction(args, kwargs))
        own = {name: values.pop(name, None) for name in ("gamma", "device", "dtype")}
        return {"config": LongNetConfig(**values), "cross_attention": self.cross, **own}


class DilatedTransformerEncoderLayer(_OldLayer):
    call = _OldLayer.call.named("DilatedTransformerEncoderLayer")

    def forward(self, src: Tensor, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        """`(B, N, d_model)` to the same."""
        return super().forward(src, is_causal=is_causal)


class DilatedTransformerDecoderLayer(_OldLayer):
    cross = True
    call = _OldLayer.call.named("DilatedTransformerDecoderLayer")

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
