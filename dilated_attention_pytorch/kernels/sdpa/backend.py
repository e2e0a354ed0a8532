"""Dilated attention through torch's own attention kernels: any device, memory linear in N, exact gradients.

Each piece of the plan works on strided views of the inputs, so nothing is gathered. The forward merges the pieces by
log-sum-exp in fp32. The backward calls torch's flash backward for each piece with the global (out, lse), which gives
the gradient of one softmax over all branches (SPEC 3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import dropout
from dilated_attention_pytorch.core.merge import merge_into, rows_last
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.core.validation import check_cu_seqlens_values
from dilated_attention_pytorch.kernels.sdpa import torch_calls
from dilated_attention_pytorch.kernels.sdpa.pieces import Piece, Rows, pieces

_ALL = slice(None)


class Part(NamedTuple):
    """One packed sequence, or the rows of a batch that share their positions: what one plan serves."""

    problem: Problem
    batch: slice
    query_rows: slice
    key_rows: slice
    first_sequence: int

    def on_queries(self, x: Tensor) -> Tensor:
        """The part of a tensor `(B, Nq, ...)`."""
        return x[self.batch, self.query_rows]

    def on_keys(self, x: Tensor) -> Tensor:
        """The part of a tensor `(B, Nk, ...)`."""
        return x[self.batch, self.key_rows]


class Extras(NamedTuple):
    """What masks and dropout need of a part, laid out like q and k so that the same views serve.

    Attributes:
        bias: `(B, Nk, 1, 1)`, 0 or -inf; None without a mask.
        q_state: int64 `(B, Nq, H, 1)`, hash state of each query; None without dropout.
        k_position: int64 `(B, Nk, 1, 1)`; None without dropout.
    """

    bias: Tensor | None
    q_state: Tensor | None
    k_position: Tensor | None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    *,
    key_padding_mask: Tensor | None = None,
    row_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Out in fp32 (fp64) and lse; arguments as in `reference.attention`."""
    q, k, v = _ready(q), _ready(k), _ready(v)
    out, lse = _empty_result(q)
    bias = _bias(problem, key_padding_mask, k)
    for part in _parts(problem, q, k, row_start, cu_seqlens):
        extras = _extras(part, q, k, bias, seed)
        tensors = part.on_queries(q), part.on_keys(k), part.on_keys(v)
        results = part.on_queries(out), part.on_queries(rows_last(lse))
        _forward_part(part.problem, extras, *tensors, *results)
    if key_padding_mask is not None:
        masked = ~key_padding_mask[:, problem.q_start : problem.q_start + q.shape[1]]
        out.masked_fill_(masked[:, :, None, None], 0.0)
        lse.masked_fill_(masked[:, None], -torch.inf)
    return out, lse


def repeater(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """What computes a forward without masks again, for tensors of the same layout, with out in their dtype."""

    def again(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = forward(q, k, v, problem)
        return out.to(q.dtype), lse

    return again


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    *,
    key_padding_mask: Tensor | None = None,
    row_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in fp32 (fp64), given what the forward returned."""
    q, k, v, out, grad_out = _ready(q), _ready(k), _ready(v), _ready(out), _ready(grad_out)
    # exp(s - inf) = 0: a query that sees nothing, or is masked, gives and gets no gradient.
    lse = rows_last(lse.masked_fill(torch.isneginf(lse), torch.inf))
    dq, dk, dv = (torch.zeros(x.shape, dtype=_accumulator(x.dtype), device=x.device) for x in (q, k, v))
    bias = _bias(problem, key_padding_mask, k)
    for part in _parts(problem, q, k, row_start, cu_seqlens):
        extras = _extras(part, q, k, bias, seed)
        tensors = part.on_queries(q), part.on_keys(k), part.on_keys(v)
        results = part.on_queries(out), part.on_queries(lse)
        upstream = part.on_queries(grad_out), None if grad_lse is None else part.on_queries(rows_last(grad_lse))
        grads = part.on_queries(dq), part.on_keys(dk), part.on_keys(dv)
        if problem.mixing_gradient == "exact":
            _backward_part(part.problem, extras, upstream, *tensors, *results, *grads)
            continue
        for branch in range(len(problem.pattern.branches)):
            # With the branch weights constant, a branch's softmax is differentiated around its own output.
            own, own_lse = _empty_result(tensors[0])
            _forward_part(part.problem, extras, *tensors, own, rows_last(own_lse), branch)
            _backward_part(part.problem, extras, upstream, *tensors, own.to(q.dtype), results[1], *grads, branch)
    return dq, dk, dv


def _forward_part(
    problem: Problem,
    extras: Extras,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    branch: int | None = None,
) -> None:
    for group, piece in _work(problem, q, k, branch):
        for call in _calls(piece, group, extras, q, k, v, out, lse):
            q_, k_, v_, bias, q_state, k_position, out_, lse_ = call
            drop = _dropout(problem, piece, q_state, k_position)
            if piece.keys.num_slots:
                new_out, new_lse = torch_calls.forward(
                    q_, k_, v_, scale=problem.scale, is_causal=piece.is_causal, bias=bias, drop=drop
                )
            else:
                new_out, new_lse = torch.zeros_like(out_), torch.full_like(lse_, -torch.inf)
            if piece.num_zero_keys:
                with_zeros = torch.logaddexp(new_lse, new_lse.new_tensor(math.log(piece.num_zero_keys)))
                new_out, new_lse = new_out * (new_lse - with_zeros).exp(), with_zeros
            if piece.is_first:
                out_.copy_(new_out)
                lse_.copy_(new_lse)
            else:
                merge_into(out_, lse_, new_out, new_lse)


def _backward_part(
    problem: Problem,
    extras: Extras,
    upstream: tuple[Tensor, Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    branch: int | None = None,
) -> None:
    grad_out, grad_lse = upstream
    for group, piece in _work(problem, q, k, branch):
        if piece.keys.num_slots == 0:
            continue
        for call in _calls(piece, group, extras, q, k, v, out, lse, grad_out, grad_lse, dq, dk, dv):
            q_, k_, v_, bias, q_state, k_position, out_, lse_, grad_out_, grad_lse_, dq_, dk_, dv_ = call
            more_dq, more_dk, more_dv = torch_calls.backward(
                grad_out_,
                q_,
                k_,
                v_,
                out_,
                lse_,
                scale=problem.scale,
                is_causal=piece.is_causal,
                bias=bias,
                drop=_dropout(problem, piece, q_state, k_position),
                grad_lse=grad_lse_,
            )
            if piece.queries is not None:
                dq_ += more_dq
            dk_ += more_dk
            dv_ += more_dv


def _work(problem: Problem, q: Tensor, k: Tensor, branch: int | None) -> Iterator[tuple[int, Piece]]:
    """Every piece, for every query head of a group in turn: heads `group, group + G, ...` pair off with k's heads."""
    for group in range(q.shape[2] // k.shape[2]):
        for piece in pieces(problem, q.shape[1], k.shape[1]):
            if branch is None or piece.branch == branch:
                yield group, piece


def _calls(
    piece: Piece,
    group: int,
    extras: Extras,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> Iterator[list[Any]]:
    """The piece's views of everything, as one or several sets of `(b, H, L, D)`: where the strides of batch and segment
    do not fit together in one dimension, the shorter of the two is walked."""
    num_heads = k.shape[2]

    def rows(x: Tensor | None, where: Rows | None, heads: slice = piece.heads) -> Tensor | None:
        if x is None or where is None:
            return None
        if x.shape[2] > num_heads:
            x = x.unflatten(2, (num_heads, -1))[:, :, :, group]
        return where.of(x, heads)

    views: list[Any] = [
        rows(q, piece.queries),
        rows(k, piece.keys),
        rows(v, piece.keys),
        rows(extras.bias, piece.keys, _ALL),
        rows(extras.q_state, piece.outputs),
        rows(extras.k_position, piece.keys, _ALL),
        rows(out, piece.outputs),
        rows(lse, piece.outputs),
    ]
    if grad_out is not None:
        views += [rows(grad_out, piece.outputs), rows(grad_lse, piece.outputs)]
        views += [rows(dq, piece.queries), rows(dk, piece.keys), rows(dv, piece.keys)]
    if piece.queries is None:
        views[0] = torch.zeros_like(views[6], dtype=q.dtype)

    present = [x for x in views if x is not None]
    batch, segments = present[0].shape[:2]
    if all(x.stride(0) == segments * x.stride(1) or 1 in (batch, segments) for x in present):
        yield [None if x is None else _heads_first(x.view(batch * segments, *x.shape[2:])) for x in views]
    elif batch <= segments:
        for b in range(batch):
            yield [None if x is None else _heads_first(x[b]) for x in views]
    else:
        for s in range(segments):
            yield [None if x is None else _heads_first(x[:, s]) for x in views]


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _dropout(
    problem: Problem, piece: Piece, q_state: Tensor | None, k_position: Tensor | None
) -> torch_calls.Dropout | None:
    if q_state is None or k_position is None:
        return None
    return torch_calls.Dropout(dropout.absorb(q_state, piece.branch), k_position, problem.dropout_p)


def _parts(
    problem: Problem, q: Tensor, k: Tensor, row_start: Tensor | None, cu_seqlens: Tensor | None
) -> Iterator[Part]:
    if q.shape[0] == 0 or q.shape[1] == 0:
        return
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        check_cu_seqlens_values(bounds, q.shape[1])
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start < stop:
                rows = slice(start, stop)
                yield Part(problem.at(0, 0, stop - start), _ALL, rows, rows, i)
    elif row_start is not None:
        for b, first in enumerate(row_start.tolist()):
            # Positions count from the row's first real token; what lies before it is nobody's query or key.
            q_skip, k_skip = max(0, first - problem.q_start), max(0, first - problem.k_start)
            moved = problem.at(
                max(0, problem.q_start - first), max(0, problem.k_start - first), max(0, problem.seq_len - first)
            )
            if q_skip < q.shape[1]:
                yield Part(moved, slice(b, b + 1), slice(q_skip, None), slice(k_skip, None), b)
    else:
        yield Part(problem, _ALL, _ALL, _ALL, 0)


def _extras(part: Part, q: Tensor, k: Tensor, bias: Tensor | None, seed: Tensor | None) -> Extras:
    problem = part.problem
    part_bias = None if bias is None else part.on_keys(bias)
    if seed is None:
        return Extras(part_bias, None, None)
    batch, num_queries, num_heads, _ = part.on_queries(q).shape
    num_keys = part.on_keys(k).shape[1]
    index = torch.arange(max(batch, num_heads, num_queries, num_keys), device=q.device)
    sequence = (part.first_sequence + index[:batch])[:, None, None, None]
    position = (problem.q_start + index[:num_queries])[:, None, None]
    q_state = dropout.row_state(seed.to(q.device), sequence, index[:num_heads, None], position)
    k_position = (problem.k_start + index[:num_keys])[:, None, None].repeat(batch, 1, 1, 1)
    return Extras(part_bias, q_state, k_position)


def _bias(problem: Problem, key_padding_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """0 for a real key and -inf for a masked one, `(B, Nk, 1, 1)`."""
    if key_padding_mask is None:
        return None
    real = key_padding_mask[:, problem.k_start : problem.k_start + k.shape[1], None, None]
    return torch.zeros(real.shape, dtype=k.dtype, device=k.device).masked_fill_(~real, -torch.inf)


def _ready(x: Tensor) -> Tensor:
    """Each row's D values side by side, as torch's kernels want them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _accumulator(q.dtype)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype)
    return q.new_zeros(q.shape, dtype=dtype), lse
