"""A linear layer of one row, with the LayerNorm before it and the activation or the residual behind it.

A decoding step of one sequence reads each weight once and computes little, so what counts is how few launches it is. A
program takes BN output columns and walks their weights; the row, which every program needs, comes from the cache.
"""

import triton
import triton.language as tl


@triton.jit
def load(x, k, K: tl.constexpr):
    """Entries `[1, BK]` in fp32, 0 behind the last: a row beside the weights' `[BN, BK]`."""
    return tl.load(x + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def moments(x, eps, K: tl.constexpr, BK: tl.constexpr):
    """Mean and inverse deviation `[1, 1]`: squares are of differences from the mean, as large means lose digits."""
    total = tl.zeros((1, BK), tl.float32)
    for first in range(0, K, BK):
        total += load(x, first + tl.arange(0, BK), K)
    mean = tl.sum(total, 1)[:, None] / K
    square = tl.zeros((1, BK), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        away = tl.where((k < K)[None, :], load(x, k, K) - mean, 0.0)
        square += away * away
    return mean, tl.math.rsqrt(tl.sum(square, 1)[:, None] / K + eps)


@triton.jit
def decode_linear(
    x, weight, bias, gamma, beta, residual, out, num_columns, eps,
    K: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out `[columns]` of x `[K]` and weight `[columns, K]`, all contiguous."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < num_columns
    if NORM:
        mean, scale = moments(x, eps, K, BK)
    # One row has no use for tensor cores: products stay in their lanes until the end.
    acc = tl.zeros((BN, BK), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        w_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
        w = tl.load(w_at, mask=inside[:, None] & (k < K)[None, :], other=0.0)  # [BN, BK]
        row = load(x, k, K)
        if NORM:
            row = (row - mean) * scale * load(gamma, k, K) + load(beta, k, K)
        # Rounded, as a LayerNorm's output is.
        acc += w.to(tl.float32) * row.to(w.dtype).to(tl.float32)
    y = tl.sum(acc, 1)
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    if RESIDUAL:
        y += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y, mask=inside)
