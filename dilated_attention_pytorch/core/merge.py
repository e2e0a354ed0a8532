"""Merging partial attention by log-sum-exp (docs/spec.md, 4): the primitive behind rings, decoding and streaming."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.validation import FLOAT_DTYPES, check_all_or_none_fake, check_dense
from dilated_attention_pytorch.types import AttentionOutput


def merge_attention(a: AttentionOutput, b: AttentionOutput) -> AttentionOutput:
    """Attention over the keys of both partials, given attention over each.

    With Z = exp(lse): `out = (Z_a out_a + Z_b out_b) / (Z_a + Z_b)`, `lse = log(Z_a + Z_b)`. The weight of b is
    `sigmoid(lse_b - lse_a)`, which neither overflows nor needs an epsilon. Differentiable in all four tensors.

    Args:
        a: `out` `(B, N, H, D)`, `lse` `(B, H, N)`; packed, `(total, H, D)` and `(H, total)`.
        b: the same shapes, over other keys of the same queries.

    Returns:
        The merged partial; computed in fp32 (fp64 for fp64), `out` in a's dtype. Where both are empty it is empty:
        `out` 0, `lse` -inf.

    Raises:
        ValueError: shapes that differ, or do not belong together.
        TypeError: something other than two tensors.
    """
    a, b = _checked("a", a), _checked("b", b)
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape:
        raise ValueError(
            "expected a and b of one shape, got "
            f"out {tuple(a.out.shape)} and {tuple(b.out.shape)}, lse {tuple(a.lse.shape)} and {tuple(b.lse.shape)}"
        )
    for x_name, x in (("a.lse", a.lse), ("b.out", b.out), ("b.lse", b.lse)):
        if x.device != a.out.device:
            raise ValueError(f"expected {x_name} on a.out's device {a.out.device}, got {x.device}")
    check_all_or_none_fake(a.out, {"a.lse": a.lse, "b.out": b.out, "b.lse": b.lse})
    dtype = accumulator(a.lse.dtype)
    lse_a, lse_b = a.lse.to(dtype), b.lse.to(dtype)
    both_empty = torch.isneginf(lse_a) & torch.isneginf(lse_b)
    # Zeros stand in where both are empty, so that no gradient passes through inf - inf.
    safe_a, safe_b = lse_a.masked_fill(both_empty, 0.0), lse_b.masked_fill(both_empty, 0.0)
    weight_b = torch.sigmoid(safe_b - safe_a).masked_fill(both_empty, 0.0)
    weight_a = torch.sigmoid(safe_a - safe_b).masked_fill(both_empty, 0.0)
    lse = torch.logaddexp(safe_a, safe_b).masked_fill(both_empty, -torch.inf)
    out = a.out.to(dtype) * rows_last(weight_a) + b.out.to(dtype) * rows_last(weight_b)
    return AttentionOutput(out.to(a.out.dtype), lse)


def merge_into(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """`merge_attention` in place, in one pass over `out`, for accumulators that autograd does not watch.

    Args:
        out: accumulator `(..., D)`, fp32 or fp64; 0 where empty.
        lse: accumulator `(..., 1)`; -inf where empty.
        new_out: `(..., D)`, finite.
        new_lse: `(..., 1)`.
    """
    weight = torch.sigmoid(new_lse - lse).nan_to_num_(nan=0.0)  # nan only for -inf - -inf: both empty
    out.lerp_(new_out.to(out.dtype), weight)
    lse.copy_(torch.logaddexp(lse, new_lse))


def _checked(name: str, partial: object) -> AttentionOutput:
    """Any pair of (out, lse) is taken, such as a plain tuple."""
    if not isinstance(partial, tuple) or len(partial) != 2 or not all(isinstance(x, Tensor) for x in partial):
        raise TypeError(f"expected {name} to be an AttentionOutput (out, lse), got {type(partial).__name__}")
    for field, x in zip(AttentionOutput._fields, partial, strict=True):
        check_dense(f"{name}.{field}", x)
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"expected {name}.{field} to be float16, bfloat16, float32 or float64, got {x.dtype}")
    out, lse = partial
    if out.dim() not in (3, 4) or lse.shape != (*out.shape[:-3], out.shape[-2], out.shape[-3]):
        raise ValueError(
            f"expected {name} of out (B, N, H, D) and lse (B, H, N), or packed (total, H, D) and (H, total), got "
            f"{tuple(out.shape)} and {tuple(lse.shape)}"
        )
    return AttentionOutput(out, lse)


def rows_last(lse: Tensor) -> Tensor:
    """`(..., H, N)` seen as `(..., N, H, 1)`, the layout of everything else."""
    return lse.transpose(-1, -2).unsqueeze(-1)
