"""The attention function: dilated where the mask says so, transformers' sdpa elsewhere."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.functional import dilated_attention
from dilated_attention_pytorch.integrations import packing
from dilated_attention_pytorch.integrations.static_step import static_step
from dilated_attention_pytorch.integrations.transformers import sharding
from dilated_attention_pytorch.integrations.transformers.masks import Form
from dilated_attention_pytorch.integrations.transformers.pattern import WITH, LayerPattern
from dilated_attention_pytorch.integrations.transformers.reach import layer_shift
from dilated_attention_pytorch.types import QKV, Offsets

# Arguments that models pass to every attention function and that change nothing here. A window is in the mask.
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "logits_to_keep", "max_length_k",
    "max_length_q", "num_items_in_batch", "output_hidden_states", "output_router_logits", "position_embeddings",
    "position_ids", "return_dict", "seq_idx", "shift_labels", "sliding_window", "use_cache",
}  # fmt: skip


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with `(B, H, Q, D)` queries to `(B, H_kv, K, D)` keys and `(B, H_kv, K, D_v)` values.

    A static cache has room behind the last query, a bounded one has forgotten what nobody sees.

    Returns:
        `(B, Q, H, D_v)`, and None for the weights.

    Raises:
        ValueError: an argument that changes attention and that the pattern cannot express, a mask that transformers
            does not make, a config without a pattern.
    """
    _check_arguments(module, kwargs)
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        form: Form | None = Form(bool(getattr(module, "is_causal", False) if is_causal is None else is_causal))
    else:
        form = Form.read(attention_mask, queries)
    cu_seqlens = _given_bounds(kwargs, query, key)
    is_own = form is None or _is_cross(module, form, queries, keys)
    if sharding.is_sharded(module):
        sharding.check_shards(module, None if is_own else form, queries, keys)
    if form is None or is_own:
        return _own(module, query, key, value, attention_mask, dropout, scaling, cu_seqlens)
    if form.step is None and form.length is not None and form.length < keys:
        key, value, keys = key[:, :, : form.length], value[:, :, : form.length], form.length
    if queries > keys:
        raise ValueError(f"expected self-attention {WITH}, got {queries} queries over {keys} keys")
    if form.real is not None and not form.is_causal and _reads_hidden_tokens(type(module).__module__):
        raise ValueError(
            f"expected no padding for {type(module).__name__} {WITH}, got an attention_mask that hides tokens: the "
            "model reads the last one, hidden or not, and dilated attention gives nothing there"
        )
    if cu_seqlens is not None:
        form = form._replace(real=None, cu_seqlens=cu_seqlens)
    return _dilated(module, query, key, value, form, dropout, scaling), None


def _dilated(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    form: Form,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    config: Any = module.config
    offsets: Offsets = getattr(config, "dilated_offsets", "modulo")
    pattern = DilatedPattern(*LayerPattern.of(module), key.shape[1], offsets)  # type: ignore[arg-type]
    total = key.shape[2] if form.length is None else form.length
    shift = layer_shift(module, pattern, total, is_causal=form.is_causal)
    batch, _, queries, head_dim = query.shape
    scale = head_dim**-0.5 if scaling is None else scaling
    if form.step is not None:
        return static_step(query, (key, value), form.step, pattern, shift, scale).transpose(1, 2)
    value_dim = value.shape[-1]
    if value_dim != head_dim:
        # Latent attention (DeepSeek) has narrower values; zeros in the last columns change no product.
        query, key, value = (F.pad(x, (0, max(head_dim, value_dim) - x.shape[-1])) for x in (query, key, value))
    x = QKV(*(y.transpose(1, 2) for y in (query, key, value)))  # (B, N, H, D)
    real = form.real
    options: dict[str, Any] = {
        "segment_shift": shift,
        "scale": scale,
        "backend": getattr(config, "dilated_backend", "auto"),
    }
    if sharding.is_sharded(module):
        return sharding.ring(module, x, pattern, form, dropout=float(dropout or 0.0), **options)[..., :value_dim]
    where: dict[str, Any] = {
        "key_padding_mask": real,
        # Positions count from a row's first real token, so left padding changes nothing; 0 for right padding.
        "row_start": None if real is None else real.int().argmax(1),
        "q_start": total - queries,
        "k_start": total - key.shape[2],
    }
    if form.cu_seqlens is not None:
        x, where = QKV(*(y.flatten(0, 1) for y in x)), {"cu_seqlens": form.cu_seqlens}
    out = dilated_attention(
        x.q,
        x.k,
        x.v,
        segment_lengths=pattern.segment_lengths,
        dilation_rates=pattern.dilation_rates,
        is_causal=form.is_causal,
        offsets=offsets,
        dropout_p=float(dropout or 0.0),
        mixing_gradient=getattr(config, "dilated_mixing_gradient", "exact"),
        **options,
        **where,
    )
    return out.reshape(batch, queries, *out.shape[-2:])[..., :value_dim]


def _own(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, None]:
    """Attention under a mask of the layer's own, or to another sequence."""
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"expected the cross-attention {type(module).__name__} to come with a bool mask {WITH}, got "
            f"{attention_mask.dtype}"
        )
    if attention_mask is not None and cu_seqlens is not None and query.shape[2] == key.shape[2]:
        numbers = packing.documents_within(cu_seqlens, query.shape[2])[0]
        apart = attention_mask & (numbers[:, None] == numbers)
        if getattr(getattr(module, "config", None), "attention_chunk_size", None) is not None:
            packing.check(
                (apart == attention_mask).all(),
                "expected packed position_ids beside cu_seq_lens_q for attention in chunks, which begin anew with each "
                "document",
            )
        attention_mask = apart
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False
    )
    return found


def _is_cross(module: nn.Module, form: Form, queries: int, keys: int) -> bool:
    """Queries look at another sequence."""
    if "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False):
        return True
    # One class serves all three uses in Bart and its kin: a decoder's layer is causal, or looks at the encoder.
    decodes = getattr(module, "is_decoder", False) and not getattr(module, "is_causal", False)
    return not form.is_causal and (queries != keys or decodes)


@torch.compiler.assume_constant_result
@functools.cache
def _reads_hidden_tokens(module: str) -> bool:
    """True if a model takes the last token for the text (SigLIP), which with padding on the right is a hidden one."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return False
    return "pooled_output = last_hidden_state[:, -1, :]" in source


def _given_bounds(kwargs: dict[str, Any], query: Tensor, key: Tensor) -> Tensor | None:
    """Bounds of packed documents that a collator gave; None if it gave none."""
    given: Tensor | None = kwargs.get("cu_seq_lens_q")
    if given is None:
        if kwargs.get("cu_seq_lens_k") is not None:
            raise ValueError(f"expected cu_seq_lens_q with cu_seq_lens_k {WITH}, got none")
        return None
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"expected one packed row, without a cache, with cu_seq_lens_q {WITH}, got {query.shape[0]} rows of "
            f"{query.shape[2]} queries and {key.shape[2]} keys"
        )
    return given


def _check_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if wrong := sorted(k for k, v in kwargs.items() if k not in _HARMLESS and v is not None and v is not False):
        given = ", ".join(f"{k}={_short(kwargs[k])}" for k in wrong)
        raise ValueError(
            f"expected {type(module).__name__} to ask for plain attention {WITH}, got {given}, which dilated attention "
            "does not have"
        )


def _short(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
