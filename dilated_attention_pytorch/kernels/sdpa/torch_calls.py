"""One attention call with its log-sum-exp, forward and backward, on whatever torch has for the device.

Every function here takes `(b, H, L, D)` views and knows nothing of dilation. The backward is given the *global* out
and lse of each query, which makes the gradients of a query's keys exact even though this call sees only part of them:
`P = exp(s - lse)` and `dS = P * (dO.v - rowsum(dO * out))` hold for every key on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import dropout, torch_private
from dilated_attention_pytorch.core.precision import accumulator, without_autocast
from dilated_attention_pytorch.types import QKV, AttentionOutput, OutputGradient

_TINY = torch.finfo(torch.float32).tiny  # a scale below it is 0 to kernels that compute in fp32
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


class Softmax(NamedTuple):
    """How logits become weights.

    Attributes:
        scale: factor on q . k.
        is_causal: query i sees keys up to i; then there are as many of one as of the other.
        bias: `(b, 1, Lk, 1)`, 0 for a real key and -inf for a masked one; None without a mask.
        drop: dropout of the weights; the lse is that of all weights.
    """

    scale: float
    is_causal: bool = False
    bias: Tensor | None = None
    drop: Dropout | None = None


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype a call runs in: the input's, but fp32 for half precision on a CPU without AMX, which is faster."""
    if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16) and not torch_private.has_amx():
        return torch.float32
    return dtype


def name(q: Tensor, how: Softmax = Softmax(1.0), grad_lse: Tensor | None = None) -> str:  # noqa: B008
    """Which engine serves a call: "cpu_flash", "cuda_flash", "cuda_efficient" or "eager"."""
    if how.drop is not None or grad_lse is not None:
        return "eager"  # torch's kernels take no mask of ours and give lse no gradient
    if q.device.type == "cpu":
        return "cpu_flash"
    if q.device.type == "cuda" and q.dtype != torch.float64 and how.bias is None:
        # 16-byte rows are what the CUDA kernels load; other head widths are rare enough for the eager engine.
        aligned = q.shape[-1] * q.element_size() % 16 == 0
        if aligned and q.dtype != torch.float32 and q.shape[-1] <= 256 and _has_flash(q.device):
            return "cuda_flash"
        if aligned and hasattr(torch.ops.aten, "_efficient_attention_forward"):
            return "cuda_efficient"
    return "eager"


def forward(x: QKV, how: Softmax) -> AttentionOutput:
    """Attention of `(b, H, Lq, D)` queries over `(b, H, Lk, D)` keys.

    Returns:
        out `(b, H, Lq, D)`, 0 where no key is seen, and lse `(b, H, Lq, 1)`, -inf there.
    """
    if how.scale < _TINY:
        sign, scale = _above_zero(how.scale)
        return forward(x._replace(q=x.q * sign), how._replace(scale=scale))
    engine, scale, causal = name(x.q, how), how.scale, how.is_causal
    if engine == "cpu_flash":
        x = QKV(*_computed(*x))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *x, 0.0, causal, attn_mask=_row_bias(how.bias, x.q.dtype), scale=scale
        )
        if how.bias is not None:  # the kernel reports lse 0 for a row that sees no key
            empty = _empty_rows(how.bias, x.q.shape[2], causal)
            out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    elif engine == "cuda_flash":
        x = QKV(*map(loadable, x))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*x, 0.0, causal, False, scale=scale)[:2]
    elif engine == "cuda_efficient":
        rows = (loadable(y).transpose(1, 2) for y in x)
        out, lse = torch.ops.aten._efficient_attention_forward(
            *rows, None, None, None, None, None, 0.0, int(causal), True, scale=scale
        )[:2]
        out, lse = out.transpose(1, 2), lse[:, :, : x.q.shape[2]]  # its lse is padded to a multiple of 32
    else:
        return _eager_forward(x.q, x, how)
    return AttentionOutput(out, lse.unsqueeze(-1))


def backward(grad: OutputGradient, x: QKV, saved: AttentionOutput, how: Softmax) -> QKV:
    """The gradients that this call's keys contribute.

    Args:
        grad: out `(b, H, Lq, D)` and lse `(b, H, Lq, 1)` or None.
        x: as in `forward`.
        saved: out `(b, H, Lq, D)` and lse `(b, H, Lq, 1)` over all keys of the query, not only these; lse is +inf for
            a query that sees no key, so that its weights vanish.
        how: as in `forward`.
    """
    if how.scale < _TINY:
        sign, scale = _above_zero(how.scale)
        dq, dk, dv = backward(grad, x._replace(q=x.q * sign), saved, how._replace(scale=scale))
        return QKV(dq * sign, dk, dv)
    engine, scale, causal = name(x.q, how, grad.lse), how.scale, how.is_causal
    lse, sizes = saved.lse.squeeze(-1), (x.q.shape[2], x.k.shape[2])
    if engine == "cpu_flash":
        grad_out, q, k, v, out = _computed(grad.out, *x, saved.out)
        return QKV(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=_row_bias(how.bias, q.dtype), scale=scale
            )
        )
    if engine == "cuda_flash":
        unused = torch.empty(2, dtype=torch.int64, device=x.q.device)  # the dropout state; nothing is dropped
        grad_out, q, k, v, out = map(loadable, (grad.out, *x, saved.out))
        return QKV(
            *torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad_out, q, k, v, out, lse.contiguous(), None, None, *sizes, 0.0, causal, unused, unused, scale=scale
            )
        )
    if engine == "cuda_efficient":
        unused = torch.zeros((), dtype=torch.int64, device=x.q.device)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
        grad_out, q, k, v, out = (loadable(y).transpose(1, 2) for y in (grad.out, *x, saved.out))
        grads = torch.ops.aten._efficient_attention_backward(
            grad_out, q, k, v, None, out, None, None, *sizes, padded, 0.0, unused, unused, int(causal), False,
            scale=scale,
        )[:3]  # fmt: skip
        return QKV(*(y.transpose(1, 2) for y in grads))
    return _eager_backward(x.q, grad, x, saved, how)


def _computed(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype the CPU computes in."""
    dtype = compute_dtype(tensors[0].device, tensors[0].dtype)
    # Dense, because a conversion would keep strides that overlap.
    return [x if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format) for x in tensors]


def loadable(x: Tensor) -> Tensor:
    """X `(b, H, L, D)`, or a dense copy where torch's CUDA kernels could not load it: they take 16 bytes at a time from
    wherever a row starts, without asking, and end the process's CUDA where that is not aligned."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in strides)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _row_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`(b, 1, 1, Lk)`, as torch's kernels take a mask."""
    return None if bias is None else bias.to(dtype).transpose(-1, -2)


def _above_zero(scale: float) -> tuple[float, float]:
    """A scale that is not above 0 as (sign for q, scale above 0).

    torch's kernels take the largest logit, and hide keys, before they scale: there a scale below 0 turns the smallest
    into the largest and a hidden -inf into inf, and 0 turns it into NaN.
    """
    return (-1.0, -scale) if -scale >= _TINY else (0.0, 1.0)


def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _empty_rows(bias: Tensor, num_queries: int, is_causal: bool) -> Tensor:
    """True for the queries whose every key is masked: `(b, 1, Lq)` from a bias `(b, 1, Lk, 1)`."""
    real = torch.isfinite(bias[..., 0])
    if is_causal:
        return real.cumsum(-1) == 0
    return ~real.any(-1, keepdim=True).expand(-1, -1, num_queries)


class _Tile(NamedTuple):
    """Some queries of some batch rows, few enough that their logits fit `_TILE_ELEMENTS`."""

    batch: slice
    queries: slice
    logits: Tensor  # (b, H, n, Lk)
    kept: Tensor | None  # factor on each weight: 0 where dropped, 1 / (1 - p) elsewhere

    def of(self, x: Tensor) -> Tensor:
        """The tile's rows of a tensor `(b, H, Lq, ...)`, in the accumulator's dtype."""
        return x[self.batch, :, self.queries].to(self.logits.dtype)


def _tiles(x: QKV, how: Softmax) -> Iterator[_Tile]:
    b, heads, num_queries, _ = x.q.shape
    num_keys, dtype = x.k.shape[2], accumulator(x.q.dtype)
    rows = max(1, min(num_queries, _TILE_ELEMENTS // max(1, heads * num_keys)))
    batches = max(1, _TILE_ELEMENTS // max(1, heads * num_keys * rows))
    for i in range(0, b, batches):
        batch = slice(i, min(i + batches, b))
        keys = x.k[batch].to(dtype).transpose(-1, -2)
        for n in range(0, num_queries, rows):
            queries = slice(n, min(n + rows, num_queries))
            s = (x.q[batch, :, queries].to(dtype) @ keys) * how.scale
            if how.bias is not None:
                s = s + how.bias[batch].transpose(-1, -2)
            if how.is_causal:
                query = torch.arange(n, queries.stop, device=s.device)[:, None]
                s = s.masked_fill(torch.arange(num_keys, device=s.device) > query, -torch.inf)
            kept = None
            if (drop := how.drop) is not None:
                keep = dropout.keep_mask(drop.rows[batch, :, queries], drop.keys[batch].transpose(-1, -2), drop.p)
                kept = keep.to(dtype) / (1.0 - drop.p)
            yield _Tile(batch, queries, s, kept)


@without_autocast
def _eager_forward(q: Tensor, x: QKV, how: Softmax) -> AttentionOutput:
    dtype = accumulator(q.dtype)
    out = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty((*q.shape[:3], 1), dtype=dtype)
    for tile in _tiles(x, how):
        tile_lse = tile.logits.logsumexp(-1, keepdim=True)
        p = (tile.logits - tile_lse.masked_fill(torch.isneginf(tile_lse), 0.0)).exp()
        if tile.kept is not None:
            p = p * tile.kept
        out[tile.batch, :, tile.queries] = p @ x.v[tile.batch].to(dtype)
        lse[tile.batch, :, tile.queries] = tile_lse
    return AttentionOutput(out, lse)


@without_autocast
def _eager_backward(q: Tensor, grad: OutputGradient, x: QKV, saved: AttentionOutput, how: Softmax) -> QKV:
    dtype = accumulator(q.dtype)
    dq = q.new_empty(q.shape, dtype=dtype)
    dk, dv = (y.new_zeros(y.shape, dtype=dtype) for y in (x.k, x.v))
    for tile in _tiles(x, how):
        b, n = tile.batch, tile.queries
        grad_out = tile.of(grad.out)
        p = (tile.logits - tile.of(saved.lse)).exp()
        dp = grad_out @ x.v[b].to(dtype).transpose(-1, -2)
        kept = p
        if tile.kept is not None:
            kept, dp = p * tile.kept, dp * tile.kept
        dv[b] += kept.transpose(-1, -2) @ grad_out
        delta = (grad_out * tile.of(saved.out)).sum(-1, keepdim=True)
        if grad.lse is not None:
            delta = delta - tile.of(grad.lse)
        ds = p * (dp - delta) * how.scale
        dq[b, :, n] = ds @ x.k[b].to(dtype)
        dk[b] += ds.transpose(-1, -2) @ tile.of(q)
    return QKV(dq, dk, dv)
