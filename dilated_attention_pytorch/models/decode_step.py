"""A decoding step of one row of a plain `LongNetLM` in six launches per layer; others go through the model's modules.

LayerNorm + q, k, v | attention in splits | merge | LayerNorm + out + residual | LayerNorm + fc1 + activation |
LayerNorm + fc2 + residual
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.models.layers import FeedForward, Layer, LayerStack
from dilated_attention_pytorch.modules import DilatedAttention, MultiheadDilatedAttention
from dilated_attention_pytorch.types import QKV

_PLAIN = {LayerStack, Layer, MultiheadDilatedAttention, DilatedAttention, FeedForward, nn.ModuleList, nn.Linear,
          nn.LayerNorm, nn.Embedding}  # fmt: skip


def suits(model: nn.Module, batch: int) -> bool:
    """Whether nobody can tell that modules are read and not called: no other class, no tensor of another kind."""
    inside, parameters = [m for m in model.modules() if m is not model], list(model.parameters())
    return (
        batch == 1  # a library's products are faster for more rows
        and type(model).__module__ == "dilated_attention_pytorch.models.longnet"
        and all(type(m) in _PLAIN and "forward" not in vars(m) for m in inside)
        and all(type(p) is nn.Parameter and p.is_contiguous() and p.dtype == parameters[0].dtype for p in parameters)
        and all(m.activation in (F.gelu, F.relu) for m in inside if isinstance(m, FeedForward))
    )


class DecodeStep:
    """The logits of a model's next step over a `DecodingCache`.

    q, k and v are one product with a copy of their weights, so a step does not outlive a change of these.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self._model, self._cache = model, cache
        self._qkv = []
        for layer in model.decoder.layers:
            parts = [getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
            bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
            self._qkv.append((torch.cat([part.weight for part in parts]), bias))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `(1, vocab_size)` of what follows tokens `(1, 1)`, whose keys and values go to the cache."""
        from dilated_attention_pytorch.kernels.triton.launch_linear import linear

        model, cache = self._model, self._cache
        x = model.embed_tokens(tokens[:, 0]) * math.sqrt(model.config.d_model)  # (1, d_model)
        rotation = cache.rotation(x.dtype)
        for layer, qkv, store in zip(model.decoder.layers, self._qkv, cache.layers, strict=True):
            attention, ffn = layer.self_attn, layer.ffn
            new = linear(x, *qkv, norm=layer.self_attn_layer_norm).unflatten(1, (-1, attention.head_dim))
            heads, kv_heads = attention.num_heads, attention.num_kv_heads
            bounds = (0, heads, heads + kv_heads, heads + 2 * kv_heads)
            parts = QKV(*(new[:, None, a:b] for a, b in pairwise(bounds)))  # (1, 1, H, D) each
            scale = attention.head_dim**-0.5 if attention.attention.scale is None else attention.attention.scale
            found = store.attend(parts, rotation, scale).flatten(1)
            out, fc1, fc2 = attention.out_proj, ffn.fc1, ffn.fc2
            x = linear(found, out.weight, out.bias, norm=attention.inner_attn_ln, residual=x)
            activation: Literal["gelu", "relu"] = "gelu" if ffn.activation is F.gelu else "relu"
            h = linear(x, fc1.weight, fc1.bias, norm=layer.final_layer_norm, activation=activation)
            x = linear(h, fc2.weight, fc2.bias, norm=ffn.ffn_layernorm, residual=x)
        cache.commit()
        head = model.embed_tokens if model.output_projection is None else model.output_projection
        return linear(x, head.weight, norm=model.decoder.layer_norm)
