"""What the backward kernels know of each query besides q, and how it is laid out for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.kernels.triton import attention_backward
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.views import strides_of
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.types import AttentionOutput, OutputGradient


class QueryTerms(NamedTuple):
    """What the backward kernels know of each query besides q.

    Attributes:
        grad: dO, `(B, N, H, D)`.
        lse: over the keys of all branches, `(B, H, N)`.
        delta: `rowsum(dO * out) - grad_lse`, `(B, H, N)`.
    """

    grad: Tensor
    lse: Tensor
    delta: Tensor


def compute_delta(work: Work, grad: OutputGradient, saved: AttentionOutput, tape: Tape) -> Tensor:
    """`rowsum(dO * out) - grad_lse`, fp32 `(B, H, N)`."""
    batch, n, heads, width = saved.out.shape
    delta = tape.empty(saved.out, (batch, heads, n), torch.float32)
    rows = 64
    args = (saved.out, grad.out, grad.lse, delta, *strides_of(saved.out, grad.out), *delta.stride()[:2], n, heads)
    flags = {"D": width, "BLOCK_D": work.block_d, "BM": rows}
    kernel, programs = attention_backward.delta_kernel, (triton.cdiv(n, rows) * heads * batch,)
    tape.note(kernel, programs, args, flags, kernel[programs](*args, **flags))
    return delta


def rows_by_slot(work: Work, terms: QueryTerms, tape: Tape, length: int, rate: int, slots: int) -> Tensor:
    """lse (log2) and delta in the order of a branch's slots, `[2 * B * H, segments * slots]`; slots past a segment's
    last have +inf and 0."""
    (q, k, _), tile_of_copy = work.x, 512
    batch, n, heads, _ = q.shape
    columns = triton.cdiv(n, length) * slots
    rows = tape.empty(q, (2 * batch * heads, columns), torch.float32)
    args = (terms.lse, terms.delta, rows, n, heads, k.shape[2], length, rate, slots, columns, batch * heads)
    flags: dict[str, Any] = {"BM": tile_of_copy, "MODULO": work.problem.pattern.offsets == "modulo"}
    kernel, programs = attention_backward.terms_kernel, (triton.cdiv(columns, tile_of_copy) * batch * heads,)
    tape.note(kernel, programs, args, flags, kernel[programs](*args, **flags))
    return rows
