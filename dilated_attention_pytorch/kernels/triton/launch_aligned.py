"""When lengths align, and how the kernels of `aligned.py` are launched."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.triton import aligned, replay
from dilated_attention_pytorch.kernels.triton.configs import Config

_LOG2E = 1.4426950408889634
_WHOLE = 1 << 30  # a segment length that no sequence exceeds
_MAX_RATE = 64


class Alignment(NamedTuple):
    """A pattern whose branches one launch can walk.

    Attributes:
        lengths: w_i, or a length beyond any sequence's for branches of one segment.
        rates: r_i.
        rate: R, their least common multiple.
        multiple: the largest number of rows of a tile that every segment is a multiple of.
        num_queries: rows of q.
        num_keys: rows of k and v; as many, where a branch has several segments.
        once: whether a key that several branches show is computed once. Then lengths ascend.
    """

    lengths: tuple[int, ...]
    rates: tuple[int, ...]
    rate: int
    multiple: int
    num_queries: int
    num_keys: int
    once: bool

    def fits(self, rows: int) -> bool:
        """Whether tiles of so many rows never straddle two segments."""
        return self.multiple % rows == 0

    def even(self, block_m: int, block_n: int) -> bool:
        """Whether queries and keys are whole numbers of such tiles, so that nothing is masked."""
        return self.num_queries % (self.rate * block_m) == 0 and self.num_keys % (self.rate * block_n) == 0

    def filled(self, block_m: int, block_n: int) -> bool:
        """Whether there are rows for one tile of each at least."""
        return block_m * self.rate <= self.num_queries and block_n * self.rate <= self.num_keys


def alignment(problem: Problem, num_queries: int, num_keys: int, *, causal: bool = False) -> Alignment | None:
    """How the branches of unmasked ranges that begin at 0 align; None where they do not, or where it is causal.

    Args:
        causal: whether that is no obstacle.
    """
    n = problem.seq_len
    square = num_queries == num_keys
    if (
        problem.q_start
        or problem.k_start
        or (problem.is_causal and not (causal and square))
        or problem.dropout_p > 0.0
        or problem.padding != "none"
        or num_queries == 0
        or num_keys == 0
    ):
        return None
    rate = math.lcm(*problem.pattern.dilation_rates)
    if rate > _MAX_RATE:
        return None
    multiple = 0  # gcd's neutral element: nothing to straddle
    lengths = []
    for length, _ in problem.pattern.branches:
        if length >= n:
            lengths.append(_WHOLE)
            continue
        if length % rate or not square:
            return None
        multiple = math.gcd(multiple, length // rate)
        lengths.append(length)
    rates = problem.pattern.dilation_rates
    branches = sorted(zip(lengths, rates, strict=True))
    once = len(branches) > 1 and all(nests(*pair) for pair in itertools.pairwise(branches))
    if once:
        lengths, rates = zip(*branches, strict=True)
    return Alignment(tuple(lengths), rates, rate, multiple, num_queries, num_keys, once)


def nests(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    """Whether every segment of a branch (w, r) lies in one of another, and that one's residues are among its own."""
    (inner_length, inner_rate), (outer_length, outer_rate) = inner, outer
    return outer_rate % inner_rate == 0 and (outer_length == _WHOLE or outer_length % inner_length == 0)


def descriptor(x: Tensor, rate: int, rows: int) -> TensorDescriptor | None:
    """The view `[B * N / rate, rate * row]` of x `(B, N, H, D)` in tiles of `rows`; None where the copy engine cannot
    have it."""
    batch, n, heads, width = x.shape
    sizes = (x.stride(0), x.stride(1), x.stride(2))
    aligned_bytes = all(size * x.element_size() % 16 == 0 for size in sizes) and x.data_ptr() % 16 == 0
    if not aligned_bytes or width & (width - 1) or width < 16 or n < rate:
        return None
    if n % rate or (batch > 1 and sizes[0] != n * sizes[1]):
        return None
    columns = (rate - 1) * sizes[1] + (heads - 1) * sizes[2] + width
    return TensorDescriptor(x, [batch * (n // rate), columns], [rate * sizes[1], 1], [rows, width])


def strided_view(x: Tensor, rate: int, rows: int, block_d: int) -> TensorDescriptor | None:
    """The view `[B, rate, H, N / rate, D]` of x `(B, N, H, D)` in tiles of `rows`; None where the copy engine cannot
    have it. Unlike `descriptor`'s it takes any D: columns from D on come as zeros."""
    batch, n, heads, width = x.shape
    strides = (x.stride(0), x.stride(1), x.stride(2), rate * x.stride(1))
    if any(size * x.element_size() % 16 for size in strides) or x.data_ptr() % 16 or n % rate:
        return None
    if block_d * x.element_size() > 512 or any(size * x.element_size() >= 1 << 40 for size in strides):
        return None
    return TensorDescriptor(x, [batch, rate, heads, n // rate, width], [*strides, 1], [1, 1, 1, rows, block_d])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    plan: Alignment,
    config: Config,
    *,
    descriptors: bool = True,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Out and lse by one launch."""
    batch, n, heads, _ = q.shape
    out = replay.empty(q, q.shape)
    lse = replay.empty(q, (batch, heads, n), torch.float32)
    even = plan.even(config.block_m, config.block_n)
    k_view = v_view = None
    if descriptors and config.descriptors and (even or batch == 1):
        k_view, v_view = descriptor(k, plan.rate, config.block_n), descriptor(v, plan.rate, config.block_n)
    num_keys = k.shape[1]
    num_tiles = triton.cdiv(triton.cdiv(n, plan.rate), config.block_m)
    replay.launch(
        aligned.aligned_forward, (batch * heads * num_tiles * plan.rate,), q, k, v, k_view, v_view, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        n, num_keys, num_keys // plan.rate, heads, k.shape[2], num_tiles, abs(problem.scale) * _LOG2E or 1e-30,
        **_flags(q, problem, plan, config, even, precision), NEGATE=problem.scale < 0, CAUSAL=problem.is_causal,
        DESCRIPTORS=k_view is not None and v_view is not None,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    plan: Alignment,
    dq_config: Config,
    dkv_config: Config,
    *,
    descriptors: bool = True,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv by two launches."""
    rows = max(dq_config.block_m, dkv_config.block_m)
    terms = terms_buffer(q, plan, rows)
    dq = backward_dq(
        grad_out, grad_lse, q, k, v, out, lse, terms, problem, plan, dq_config, descriptors=descriptors,
        precision=precision,
    )  # fmt: skip
    dk, dv = backward_dkv(
        grad_out, q, k, v, terms, problem, plan, dkv_config, descriptors=descriptors, precision=precision
    )
    return dq, dk, dv


def terms_buffer(q: Tensor, plan: Alignment, rows: int) -> Tensor:
    """Room for what the dK/dV pass needs of each query row, `[2, B, H, R, rows of a residue]`, in whole tiles."""
    batch, n, heads, _ = q.shape
    length = triton.cdiv(triton.cdiv(n, plan.rate), rows) * rows
    return replay.empty(q, (2, batch, heads, plan.rate, length), torch.float32)


def backward_dq(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: Tensor,
    problem: Problem,
    plan: Alignment,
    config: Config,
    *,
    descriptors: bool = True,
    precision: str = "ieee",
) -> Tensor:
    """dq; fills terms."""
    batch, n, heads, _ = q.shape
    dq = replay.empty(q, q.shape)
    even = plan.even(config.block_m, config.block_n)
    k_view = v_view = None
    if descriptors and config.descriptors and (even or batch == 1):
        k_view, v_view = descriptor(k, plan.rate, config.block_n), descriptor(v, plan.rate, config.block_n)
    num_tiles = terms.shape[4] // config.block_m
    replay.launch(
        aligned.aligned_backward_dq, (batch * heads * num_tiles * plan.rate,), q, k, v, k_view, v_view, out, grad_out,
        lse, grad_lse, terms, dq,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *grad_out.stride()[:3],
        *dq.stride()[:3], *lse.stride()[:2], n, k.shape[1], k.shape[1] // plan.rate, terms.shape[4], heads, k.shape[2],
        num_tiles, problem.scale * _LOG2E, problem.scale, **_flags(q, problem, plan, config, even, precision),
        GRAD_LSE=grad_lse is not None, DESCRIPTORS=k_view is not None and v_view is not None,
    )  # fmt: skip
    return dq


def backward_dkv(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Tensor,
    problem: Problem,
    plan: Alignment,
    config: Config,
    *,
    descriptors: bool = True,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """dk and dv."""
    batch, n, heads, _ = q.shape
    kv_heads = k.shape[2]
    dk, dv = replay.empty(k, k.shape), replay.empty(v, v.shape)
    even = plan.even(config.block_m, config.block_n)
    q_view = grad_view = None
    if descriptors and config.descriptors and (even or batch == 1):
        q_view, grad_view = descriptor(q, plan.rate, config.block_m), descriptor(grad_out, plan.rate, config.block_m)
    length = terms.shape[4]
    terms_view = TensorDescriptor(terms, [2 * batch * heads * plan.rate, length], [length, 1], [1, config.block_m])
    num_tiles = triton.cdiv(triton.cdiv(k.shape[1], plan.rate), config.block_n)
    replay.launch(
        aligned.aligned_backward_dkv, (batch * kv_heads * num_tiles * plan.rate,), q, k, v, q_view, grad_view,
        grad_out, terms_view, dk, dv,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dk.stride()[:3],
        n, k.shape[1], n // plan.rate, batch, heads, kv_heads, num_tiles, problem.scale * _LOG2E, problem.scale,
        **_flags(q, problem, plan, config, even, precision), GROUP=heads // kv_heads, EARLY=config.early,
        DESCRIPTORS=q_view is not None and grad_view is not None,
    )  # fmt: skip
    return dk, dv


def _flags(q: Tensor, problem: Problem, plan: Alignment, config: Config, even: bool, precision: str) -> dict[str, Any]:
    options: dict[str, Any] = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    return options | {
        "LENGTHS": plan.lengths,
        "RATES": plan.rates,
        "R": plan.rate,
        "D": q.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
        "BM": config.block_m,
        "BN": config.block_n,
        "MODULO": problem.pattern.offsets == "modulo",
        "ONCE": plan.once,
        "EVEN": even,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
