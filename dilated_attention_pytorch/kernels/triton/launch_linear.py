"""Launches the linear layers of a decoding step."""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor, nn

from dilated_attention_pytorch.kernels.triton.linear import decode_linear
from dilated_attention_pytorch.kernels.triton.support import MOST_ROWS, interpreting


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: nn.LayerNorm | None = None,
    activation: Literal["gelu", "relu"] | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`activation(norm(x) @ weight.T + bias) + residual`, in one launch, rounded once at its end.

    Args:
        x: `(B, K)`, contiguous, like all others.
        weight: `(N, K)` in x's dtype.
        bias: `(N,)`.
        norm: with weight and bias; only read.
        activation: none by default.
        residual: `(B, N)`.

    Returns:
        `(B, N)` in x's dtype.
    """
    rows, width = x.shape
    columns = weight.shape[0]
    out = x.new_empty(rows, columns)
    block_m, block_n, block_k = tiles(rows, columns, width, x.element_size())
    decode_linear[(triton.cdiv(columns, block_n), triton.cdiv(rows, block_m))](
        x, weight, bias, None if norm is None else norm.weight, None if norm is None else norm.bias, residual, out,
        rows, columns, 0.0 if norm is None else norm.eps, K=width, BIAS=bias is not None, NORM=norm is not None,
        ACTIVATION=activation, RESIDUAL=residual is not None, BM=block_m, BN=block_n, BK=block_k,
        PRECISION="tf32x3" if x.dtype == torch.float32 and not interpreting() else "ieee", num_warps=4,
        num_stages=1 if block_m == 1 else 4 if block_m < MOST_ROWS else 3,
    )  # fmt: skip
    return out


def tiles(rows: int, columns: int, width: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, columns and inputs of a tile: programs for about every multiprocessor, and wide reads."""
    few, some = columns <= 2048, columns <= 8192
    if rows == 1:
        block_n = 8 if few else 16 if some else 32
        return 1, block_n, min(triton.next_power_of_2(width), 8192 // block_n)
    block_n = 16 if few else 32 if some else 128 // itemsize
    return max(16, min(MOST_ROWS, triton.next_power_of_2(rows))), block_n, 256 // itemsize
