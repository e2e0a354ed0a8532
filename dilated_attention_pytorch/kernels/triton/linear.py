"""A linear layer for few rows, with the LayerNorm before it and the activation or the residual behind it.

A decoding step reads each weight once and computes little, so what counts is how few launches it is. A program takes
BN output columns and walks their weights; the rows, which every program needs, come from the cache each time.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(x, m, k, num_rows, K: tl.constexpr):
    """Rows `[BM, BK]` in fp32, and which of them are there."""
    inside = (m < num_rows)[:, None] & (k < K)[None, :]
    return tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def moments(x, m, num_rows, eps, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Mean and inverse deviation `[BM]`: squares are of differences from the mean, as large means lose digits."""
    mean = tl.zeros((BM,), tl.float32)
    for first in range(0, K, BK):
        rows, _ = load_rows(x, m, first + tl.arange(0, BK), num_rows, K)
        mean += tl.sum(rows, 1)
    mean = mean / K
    square = tl.zeros((BM,), tl.float32)
    for first in range(0, K, BK):
        rows, inside = load_rows(x, m, first + tl.arange(0, BK), num_rows, K)
        away = tl.where(inside, rows - mean[:, None], 0.0)
        square += tl.sum(away * away, 1)
    return mean, tl.math.rsqrt(square / K + eps)


@triton.jit
def decode_linear(
    x, weight, bias, gamma, beta, residual, out, num_rows, num_columns, eps,
    K: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[rows, columns]` of x `[rows, K]` and weight `[columns, K]`, all contiguous."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    if NORM:
        mean, scale = moments(x, m, num_rows, eps, K, BM, BK)
    # One row has no use for tensor cores: products stay in their lanes until the end.
    if BM == 1:
        acc = tl.zeros((BN, BK), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        w_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
        w = tl.load(w_at, mask=(n < num_columns)[:, None] & (k < K)[None, :], other=0.0)  # [BN, BK]
        rows, _ = load_rows(x, m, k, num_rows, K)
        if NORM:
            g = tl.load(gamma + k, mask=k < K, other=0.0).to(tl.float32)
            b = tl.load(beta + k, mask=k < K, other=0.0).to(tl.float32)
            rows = (rows - mean[:, None]) * scale[:, None] * g[None, :] + b[None, :]
        rows = rows.to(w.dtype)  # rounded, as a LayerNorm's output is
        if BM == 1:
            acc += w.to(tl.float32) * rows.to(tl.float32)
        else:
            acc = tl.dot(rows, tl.trans(w), acc, input_precision=PRECISION)
    if BM == 1:
        y = tl.sum(acc, 1)[None, :]
    else:
        y = acc
    inside = (m < num_rows)[:, None] & (n < num_columns)[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=n < num_columns, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    at = m.to(tl.int64)[:, None] * num_columns + n[None, :]
    if RESIDUAL:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y, mask=inside)
