"""One attention call with its log-sum-exp, forward and backward, on whatever torch has for the device.

Every function here takes `(b, H, L, D)` views and knows nothing of dilation. The backward is given the *global* out
and lse of each query, which makes the gradients of a query's keys exact even though this call sees only part of them:
`P = exp(s - lse)` and `dS = P * (dO.v - rowsum(dO * out))` hold for every key on its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import dropout
from dilated_attention_pytorch.core.precision import without_autocast

_TILE_ELEMENTS = 1 << 23  # logits that the eager engine holds at a time: 32 MiB in fp32


class Dropout(NamedTuple):
    """What decides which weights of one call are dropped.

    Attributes:
        rows: int64 `(b, H, Lq, 1)`, hash state of each query, branch absorbed.
        keys: int64 `(b, 1, Lk, 1)`, position of each key.
        p: probability.
    """

    rows: Tensor
    keys: Tensor
    p: float


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype a call runs in: the input's, but fp32 for half precision on a CPU without AMX, which is faster."""
    if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16) and not torch.cpu._is_amx_tile_supported():
        return torch.float32
    return dtype


def name(q: Tensor, bias: Tensor | None = None, drop: Dropout | None = None, grad_lse: Tensor | None = None) -> str:
    """Which engine serves a call: "cpu_flash", "cuda_flash", "cuda_efficient" or "eager"."""
    if drop is not None or grad_lse is not None:
        return "eager"  # torch's kernels take no mask of ours and give lse no gradient
    if q.device.type == "cpu":
        return "cpu_flash"
    if q.device.type == "cuda" and q.dtype != torch.float64:
        # 16-byte rows are what the CUDA kernels load; other head widths are rare enough for the eager engine.
        aligned = q.shape[-1] * q.element_size() % 16 == 0
        if aligned and bias is None and q.dtype != torch.float32 and q.shape[-1] <= 256 and _has_flash(q.device):
            return "cuda_flash"
        if aligned and bias is None and hasattr(torch.ops.aten, "_efficient_attention_forward"):
            return "cuda_efficient"
    return "eager"


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool, bias: Tensor | None, drop: Dropout | None
) -> tuple[Tensor, Tensor]:
    """Attention of q over k, v.

    Args:
        q: `(b, H, Lq, D)`.
        k: `(b, H, Lk, D)`; when causal, Lk = Lq and query i sees keys up to i.
        v: like k.
        scale: factor on q . k.
        is_causal: see k.
        bias: `(b, 1, Lk, 1)`, 0 for a real key and -inf for a masked one.
        drop: dropout of the weights; the lse is that of all weights.

    Returns:
        out `(b, H, Lq, D)`, 0 where no key is seen, and lse `(b, H, Lq, 1)`, -inf there.
    """
    if scale <= 0:
        sign, scale = _above_zero(scale)
        return forward(q * sign, k, v, scale=scale, is_causal=is_causal, bias=bias, drop=drop)
    engine = name(q, bias, drop)
    if engine == "cpu_flash":
        dtype = compute_dtype(q.device, q.dtype)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        mask = None if bias is None else bias.to(dtype).transpose(-1, -2)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        if bias is not None:  # the kernel reports lse 0 for a row that sees no key
            empty = _empty_rows(bias, q.shape[2], is_causal)
            out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    elif engine == "cuda_flash":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
    elif engine == "cuda_efficient":
        out, lse = torch.ops.aten._efficient_attention_forward(
            *(x.transpose(1, 2) for x in (q, k, v)),
            None,
            None,
            None,
            None,
            None,
            0.0,
            int(is_causal),
            True,
            scale=scale,
        )[:2]
        out, lse = out.transpose(1, 2), lse[:, :, : q.shape[2]]  # its lse is padded to a multiple of 32
    else:
        return _eager_forward(q, k, v, scale, is_causal, bias, drop)
    return out, lse.unsqueeze(-1)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    is_causal: bool,
    bias: Tensor | None,
    drop: Dropout | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that this call's keys contribute.

    Args:
        grad_out: `(b, H, Lq, D)`.
        q, k, v, scale, is_causal, bias, drop: as in `forward`.
        out: `(b, H, Lq, D)`, over all keys of the query, not only these.
        lse: `(b, H, Lq, 1)`, likewise; +inf for a query that sees no key, so that its weights vanish.
        grad_lse: `(b, H, Lq, 1)` or None.

    Returns:
        grad of q, k, v.
    """
    if scale <= 0:
        sign, scale = _above_zero(scale)
        rest: dict[str, Any] = {"is_causal": is_causal, "bias": bias, "drop": drop, "grad_lse": grad_lse}
        dq, dk, dv = backward(grad_out, q * sign, k, v, out, lse, scale=scale, **rest)
        return dq * sign, dk, dv
    engine = name(q, bias, drop, grad_lse)
    rows = lse.squeeze(-1)
    if engine == "cpu_flash":
        dtype = compute_dtype(q.device, q.dtype)
        grad_out, q, k, v, out = (x.to(dtype) for x in (grad_out, q, k, v, out))
        mask = None if bias is None else bias.to(dtype).transpose(-1, -2)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, rows, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    if engine == "cuda_flash":
        unused = torch.empty(2, dtype=torch.int64, device=q.device)  # the dropout state; nothing is dropped
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out,
            q,
            k,
            v,
            out,
            rows.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            is_causal,
            unused,
            unused,
            scale=scale,
        )
    if engine == "cuda_efficient":
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[2] % 32), value=torch.inf)
        grads = torch.ops.aten._efficient_attention_backward(
            *(x.transpose(1, 2) for x in (grad_out, q, k, v)),
            None,
            out.transpose(1, 2),
            None,
            None,
            q.shape[2],
            k.shape[2],
            padded,
            0.0,
            unused,
            unused,
            int(is_causal),
            False,
            scale=scale,
        )[:3]
        return tuple(x.transpose(1, 2) for x in grads)
    return _eager_backward(grad_out, q, k, v, out, lse, scale, is_causal, bias, drop, grad_lse)


def _above_zero(scale: float) -> tuple[float, float]:
    """A scale that is not above 0 as (sign for q, scale above 0).

    torch's kernels take the largest logit, and hide keys, before they scale: there a scale below 0 turns the smallest
    into the largest and a hidden -inf into inf, and 0 turns it into NaN.
    """
    return (-1.0, -scale) if scale < 0 else (0.0, 1.0)


def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _empty_rows(bias: Tensor, num_queries: int, is_causal: bool) -> Tensor:
    """True for the queries whose every key is masked: `(b, 1, Lq)` from a bias `(b, 1, Lk, 1)`."""
    real = torch.isfinite(bias[..., 0])
    if is_causal:
        return real.cumsum(-1) == 0
    return ~real.any(-1, keepdim=True).expand(-1, -1, num_queries)


def _tiles(q: Tensor, num_keys: int) -> list[tuple[slice, slice]]:
    """Slices of (batch, queries) whose logits stay within the tile size, so that memory is linear in length."""
    b, heads, num_queries, _ = q.shape
    rows = max(1, min(num_queries, _TILE_ELEMENTS // max(1, heads * num_keys)))
    batches = max(1, _TILE_ELEMENTS // max(1, heads * num_keys * rows))
    return [
        (slice(i, min(i + batches, b)), slice(n, min(n + rows, num_queries)))
        for i in range(0, b, batches)
        for n in range(0, num_queries, rows)
    ]


def _logits(q: Tensor, k: Tensor, scale: float, is_causal: bool, bias: Tensor | None, first: int) -> Tensor:
    s = (q @ k.transpose(-1, -2)) * scale
    if bias is not None:
        s = s + bias.transpose(-1, -2)
    if is_causal:
        query = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
        s = s.masked_fill(torch.arange(k.shape[2], device=q.device) > query, -torch.inf)
    return s


def _kept(drop: Dropout, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """The factor on each weight: 0 where dropped, 1 / (1 - p) elsewhere."""
    keep = dropout.keep_mask(drop.rows[b, :, n], drop.keys[b].transpose(-1, -2), drop.p)
    return keep.to(dtype) / (1.0 - drop.p)


@without_autocast
def _eager_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, bias: Tensor | None, drop: Dropout | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty((*q.shape[:3], 1), dtype=dtype)
    for b, n in _tiles(q, k.shape[2]):
        keys, values = k[b].to(dtype), v[b].to(dtype)
        s = _logits(q[b, :, n].to(dtype), keys, scale, is_causal, None if bias is None else bias[b], n.start)
        tile_lse = s.logsumexp(-1, keepdim=True)
        p = (s - tile_lse.masked_fill(torch.isneginf(tile_lse), 0.0)).exp()
        if drop is not None:
            p = p * _kept(drop, b, n, dtype)
        out[b, :, n] = p @ values
        lse[b, :, n] = tile_lse
    return out, lse


@without_autocast
def _eager_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    bias: Tensor | None,
    drop: Dropout | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq = q.new_empty(q.shape, dtype=dtype)
    dk, dv = k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    for b, n in _tiles(q, k.shape[2]):
        queries, keys, values = q[b, :, n].to(dtype), k[b].to(dtype), v[b].to(dtype)
        grad = grad_out[b, :, n].to(dtype)
        s = _logits(queries, keys, scale, is_causal, None if bias is None else bias[b], n.start)
        p = (s - lse[b, :, n].to(dtype)).exp()
        dp = grad @ values.transpose(-1, -2)
        kept = p
        if drop is not None:
            factor = _kept(drop, b, n, dtype)
            kept, dp = p * factor, dp * factor
        dv[b] += kept.transpose(-1, -2) @ grad
        delta = (grad * out[b, :, n].to(dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[b, :, n].to(dtype)
        ds = p * (dp - delta) * scale
        dq[b, :, n] = ds @ keys
        dk[b] += ds.transpose(-1, -2) @ queries
    return dq, dk, dv
