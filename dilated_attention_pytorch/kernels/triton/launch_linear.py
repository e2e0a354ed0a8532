"""Launches the linear layers of a decoding step of one row."""

from __future__ import annotations

from typing import Literal

import triton
from torch import Tensor, nn

from dilated_attention_pytorch.kernels.triton.linear import decode_linear


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: nn.LayerNorm | None = None,
    activation: Literal["gelu", "relu"] | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`activation(norm(x) @ weight.T + bias) + residual`, in one launch, rounded once at its end.

    Args:
        x: `(1, K)`, contiguous, like all others.
        weight: `(N, K)` in x's dtype.
        bias: `(N,)`.
        norm: with weight and bias; only read.
        activation: none by default.
        residual: `(1, N)`.

    Returns:
        `(1, N)` in x's dtype.
    """
    columns, width = weight.shape
    out = x.new_empty(1, columns)
    block_n, block_k = tile(columns, width)
    decode_linear[(triton.cdiv(columns, block_n),)](
        x, weight, bias, None if norm is None else norm.weight, None if norm is None else norm.bias, residual, out,
        columns, 0.0 if norm is None else norm.eps, K=width, BIAS=bias is not None, NORM=norm is not None,
        ACTIVATION=activation, RESIDUAL=residual is not None, BN=block_n, BK=block_k, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def tile(columns: int, width: int) -> tuple[int, int]:
    """Columns and inputs of a program: about one program for every multiprocessor, and wide reads."""
    block_n = 8 if columns <= 2048 else 16 if columns <= 8192 else 32
    return block_n, min(triton.next_power_of_2(width), 8192 // block_n)
