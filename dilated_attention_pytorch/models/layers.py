"""Pre-LN layers with MAGNETO's sub-LN, named as in the official checkpoints, and a stack of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypedDict, TypeVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch.core.positions import Rotation
from dilated_attention_pytorch.core.validation import FLOAT_DTYPES, check_dense, check_multiplicand
from dilated_attention_pytorch.functional import in_autocast_dtype
from dilated_attention_pytorch.models.config import LongNetConfig
from dilated_attention_pytorch.models.reach import warn_out_of_reach
from dilated_attention_pytorch.models.recompute import gelu_norm_linear, is_plain
from dilated_attention_pytorch.modules import KeyValueStore, MultiheadDilatedAttention
from dilated_attention_pytorch.types import BackendName


class RowMask(TypedDict, total=False):
    """Which rows of a batch are real and where its sequences begin; keyword arguments of all forwards."""

    key_padding_mask: Tensor | None  # bool (B, N), True = real
    row_start: Tensor | None  # int (B,), first real position of each left-padded row
    cu_seqlens: Tensor | None  # int (sequences + 1,), bounds of packed sequences


_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def names_rows(forward: _Forward) -> _Forward:
    """Lists the arguments of `**rows: Unpack[RowMask]` in a forward's signature: exporters bind inputs by name."""
    signature = inspect.signature(forward)
    known = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
    rows = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in RowMask.__annotations__]
    forward.__signature__ = signature.replace(parameters=known + rows)  # type: ignore[attr-defined]
    return forward


class FeedForward(nn.Module):
    """`fc2(LayerNorm(activation(fc1(x))))`: the feed-forward network with sub-LN (arXiv 2210.06423, figure 2).

    Both weights start as xavier-normal with gain `gamma`. With `recompute` and GELU only `fc1`'s output is kept for the
    backward, and what follows from it is computed again: a third of the memory, first derivatives only. A norm with
    hooks, or another module in its place, is called instead, and nothing is computed again.
    """

    def __init__(self, config: LongNetConfig, gamma: float, *, recompute: bool = False, **factory: Any) -> None:
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
        if self.recompute and is_plain(self.ffn_layernorm):
            return gelu_norm_linear(h, self.ffn_layernorm, self.fc2)
        return self.fc2(self.ffn_layernorm(self.activation(h)))  # type: ignore[no-any-return]


# What a layer's attention takes from the config, under the same names.
_OF_ATTENTION = ("segment_lengths", "dilation_rates", "num_kv_heads", "layer_norm_eps", "positions", "rotary_base",
                 "scale_base", "offsets", "mixing_gradient", "padding")  # fmt: skip


class Layer(nn.Module):
    """Self-attention, cross-attention where asked for, feed-forward; each is added to its input.
    `gamma` is MAGNETO's gain. Cross-attention keeps 1, as in the official code."""

    def __init__(
        self,
        config: LongNetConfig,
        gamma: float,
        *,
        cross_attention: bool = False,
        recompute: bool = False,
        segment_shift: int = 0,
        backend: BackendName = "auto",
        **factory: Any,
    ) -> None:
        super().__init__()

        def attention(gain: float) -> MultiheadDilatedAttention:
            options: dict[str, Any] = {name: getattr(config, name) for name in _OF_ATTENTION}
            options |= {"gamma_init": gain, "segment_shift": segment_shift, "backend": backend, **factory}
            return MultiheadDilatedAttention(config.d_model, config.nhead, config.attention_dropout, **options)

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
        **rows: Unpack[RowMask],
    ) -> Tensor:
        """`(B, N, d_model)`, or `(total, d_model)` with `cu_seqlens`, to the same; the memory is like x.
        `scales` `(2, ...)` are factors that broadcast to x, on the outputs of self-attention and feed-forward."""
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

    Each is 0 with a probability that rises linearly from 0 at the first layer to `rate` at the last. Otherwise it is
    the inverse of the probability of keeping it.
    """
    keep = 1.0 - torch.linspace(0.0, rate, depth, device=device)[:, None, None]
    return torch.bernoulli(keep.expand(-1, 2, batch)) / keep


class LayerStack(nn.Module):
    """Layers one after the other, and a LayerNorm at the end; `options` are further arguments of `Layer`."""

    def __init__(
        self, config: LongNetConfig, num_layers: int, gamma: float, factory: dict[str, Any], **options: Any
    ) -> None:
        super().__init__()
        self.pattern, self.shifts = config.pattern, config.shifts(num_layers)
        self.layers = nn.ModuleList(
            Layer(config, gamma, segment_shift=shift, **options, **factory) for shift in self.shifts
        )
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, **factory)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        each: Callable[[Tensor], Any] | None = None,
        normed: bool = True,
        **options: Any,
    ) -> Tensor:
        """The last of `states`, after the final LayerNorm if `normed`; other arguments are those of `states`.
        `each` is called with x and with every state."""
        last = x
        for last in chain([x], self.states(x, memory, **options)):
            if each is not None:
                each(last)
        return self.layer_norm(last) if normed else last

    def states(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        start: int = 0,
        caches: Sequence[KeyValueStore] | None = None,
        scales: Tensor | None = None,
        rotation: Rotation | None = None,
        gradient_checkpointing: bool = False,
        **options: Any,
    ) -> Iterator[Tensor]:
        """The output of each layer, shaped like x, one after the other, without the final LayerNorm.

        There is one cache and one pair of scales per layer; `options` are further arguments of `Layer.forward`. `start`
        is the position of the first row, `rotation` that of all rows where the caller knows them better.
        """
        check_dense("x", x)
        first: MultiheadDilatedAttention = self.layers[0].self_attn  # type: ignore[assignment]
        rank, width = 3 if options.get("cu_seqlens") is None else 2, first.embed_dim
        if x.dim() != rank or x.shape[-1] != width:
            layout = f"(total, {width}) with cu_seqlens" if rank == 2 else f"(B, N, {width})"
            raise ValueError(f"expected x of shape {layout}, got {tuple(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"expected x to be float16, bfloat16, float32 or float64, got {x.dtype}")
        if rank == 3 and not torch.compiler.is_compiling():
            is_causal = options.get("is_causal", False)
            warn_out_of_reach(self.pattern, self.shifts, start + x.shape[1], is_causal=is_causal)
        # Rows stand at the same positions in every layer, so the tables of cosines are made once.
        where = {name: options.get(name) for name in ("row_start", "cu_seqlens")}
        options["rotation"] = rotation or first.rotation(x, start=start, **where)
        again = gradient_checkpointing and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            cache, scale = None if caches is None else caches[i], None if scales is None else scales[i]
            run = partial(layer, cache=cache, scales=scale, **options)
            x = checkpoint(run, x, memory, use_reentrant=False) if again else run(x, memory)
            yield x


def has_head_groups(model: nn.Module) -> bool:
    """Whether a model was made in legacy mode: each head has one branch then, which no config tells."""
    return any(getattr(module, "head_groups", False) for module in model.modules())
