"""Dilated attention through torch's own attention kernels: any device, memory linear in N, exact gradients.

Each piece of the plan works on strided views of the inputs, so nothing is gathered. The forward merges the pieces by
log-sum-exp in fp32. The backward calls torch's flash backward for each piece with the global (out, lse), which gives
the gradient of one softmax over all branches (docs/spec.md, 3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import dropout
from dilated_attention_pytorch.core.merge import merge_into, rows_last
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.core.validation import check_cu_seqlens_values
from dilated_attention_pytorch.kernels.backend import Repeat
from dilated_attention_pytorch.kernels.sdpa import torch_calls
from dilated_attention_pytorch.kernels.sdpa.pieces import Piece, pieces
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, Masks, OutputGradient

_ALL = slice(None)


class Operands(NamedTuple):
    """Everything a piece reads and writes, all laid out like q or like k: whole tensors, a part's, or a piece's views.

    Rows of queries: `(B, Nq, H, ...)`; rows of keys: `(B, Nk, H_kv, ...)`.

    Attributes:
        q, k, v: the inputs.
        out, lse: `(B, Nq, H, D)` and `(B, Nq, H, 1)`: written by the forward, read by the backward.
        bias: `(B, Nk, 1, 1)`, 0 or -inf; None without a mask.
        q_state: int64 `(B, Nq, H, 1)`, dropout's hash state of each query; None without dropout.
        k_position: int64 `(B, Nk, 1, 1)`; None without dropout.
        grad_out, grad_lse: what reaches out and lse; None in the forward.
        dq, dk, dv: what the backward adds to.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    bias: Tensor | None = None
    q_state: Tensor | None = None
    k_position: Tensor | None = None
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


_OF_KEYS = {"k", "v", "bias", "k_position", "dk", "dv"}
_OF_READ_QUERIES = {"q", "dq"}  # zero keys may move outputs to other rows than queries are read from
_WITHOUT_HEADS = {"bias", "k_position"}


class BatchPart(NamedTuple):
    """One packed sequence, or the rows of a batch that share their positions: what one plan serves."""

    problem: Problem
    batch: slice
    query_rows: slice
    key_rows: slice
    first_sequence: int

    def of(self, whole: Operands) -> Operands:
        """The part's rows of all operands."""
        found = {
            name: None if x is None else x[self.batch, self.key_rows if name in _OF_KEYS else self.query_rows]
            for name, x in whole._asdict().items()
        }
        return Operands(**found)  # type: ignore[arg-type]


def why_not(x: QKV, problem: Problem) -> list[str]:
    """Nothing: torch's attention takes every device, dtype and width, and the eager engine the rest."""
    return []


def forward(x: QKV, problem: Problem, masks: Masks = NO_MASKS) -> AttentionOutput:
    """Out in fp32 (fp64) and lse, `(B, Nq, H, D)` and `(B, H, Nq)`."""
    x = QKV(*(_ready(y) for y in x))
    out, lse = _empty_result(x.q)
    whole = Operands(*x, out, rows_last(lse), bias=_bias(problem, masks, x.k))
    for part in _parts(x, problem, masks):
        _forward_part(part.problem, _with_dropout(part, part.of(whole), masks.seed))
    if masks.key_padding is not None:
        masked = ~masks.key_padding[:, problem.q_start : problem.q_start + x.q.shape[1]]
        out.masked_fill_(masked[:, :, None, None], 0.0)
        lse.masked_fill_(masked[:, None], -torch.inf)
    return AttentionOutput(out, lse)


def backward(grad: OutputGradient, x: QKV, saved: AttentionOutput, problem: Problem, masks: Masks = NO_MASKS) -> QKV:
    """Gradients of q, k and v in fp32 (fp64), given what the forward returned."""
    x = QKV(*(_ready(y) for y in x))
    # exp(s - inf) = 0: a query that sees nothing, or is masked, gives and gets no gradient.
    lse = rows_last(saved.lse.masked_fill(torch.isneginf(saved.lse), torch.inf))
    grads = QKV(*(torch.zeros(y.shape, dtype=accumulator(y.dtype), device=y.device) for y in x))
    whole = Operands(
        *x, _ready(saved.out), lse, bias=_bias(problem, masks, x.k), grad_out=_ready(grad.out),
        grad_lse=None if grad.lse is None else rows_last(grad.lse), dq=grads.q, dk=grads.k, dv=grads.v,
    )  # fmt: skip
    for part in _parts(x, problem, masks):
        operands = _with_dropout(part, part.of(whole), masks.seed)
        if problem.mixing_gradient == "exact":
            _backward_part(part.problem, operands)
            continue
        for branch in range(len(problem.pattern.branches)):
            # With the branch weights constant, a branch's softmax is differentiated around its own output.
            own, own_lse = _empty_result(operands.q)
            _forward_part(part.problem, operands._replace(out=own, lse=rows_last(own_lse)), branch)
            _backward_part(part.problem, operands._replace(out=own.to(x.q.dtype)), branch)
    return grads


def repeater(x: QKV, problem: Problem) -> Repeat:
    """Computes a forward without masks again, for tensors of the same layout, with out in their dtype."""

    def again(x: QKV) -> AttentionOutput:
        out, lse = forward(x, problem)
        return AttentionOutput(out.to(x.q.dtype), lse)

    return again


def _forward_part(problem: Problem, operands: Operands, branch: int | None = None) -> None:
    """Merges every piece into `operands.out` and `operands.lse`."""
    for piece, views in _views(problem, operands, branch):
        if piece.keys.num_slots:
            out, lse = torch_calls.forward(QKV(views.q, views.k, views.v), _softmax(problem, piece, views))
        else:
            out, lse = torch.zeros_like(views.out), torch.full_like(views.lse, -torch.inf)
        if piece.num_zero_keys:
            with_zeros = torch.logaddexp(lse, lse.new_tensor(math.log(piece.num_zero_keys)))
            out, lse = out * (lse - with_zeros).exp(), with_zeros
        if piece.is_first:
            views.out.copy_(out)
            views.lse.copy_(lse)
        else:
            merge_into(views.out, views.lse, out, lse)


def _backward_part(problem: Problem, operands: Operands, branch: int | None = None) -> None:
    """Adds every piece's gradients to `operands.dq`, `dk` and `dv`."""
    for piece, views in _views(problem, operands, branch):
        if piece.keys.num_slots == 0:
            continue
        assert views.grad_out is not None and views.dk is not None and views.dv is not None
        dq, dk, dv = torch_calls.backward(
            OutputGradient(views.grad_out, views.grad_lse),
            QKV(views.q, views.k, views.v),
            AttentionOutput(views.out, views.lse),
            _softmax(problem, piece, views),
        )
        if views.dq is not None:
            views.dq.add_(dq)
        views.dk.add_(dk)
        views.dv.add_(dv)


def _softmax(problem: Problem, piece: Piece, views: Operands) -> torch_calls.Softmax:
    drop = None
    if views.q_state is not None and views.k_position is not None:
        state = dropout.absorb(views.q_state, piece.branch)
        drop = torch_calls.Dropout(state, views.k_position, problem.dropout_p)
    return torch_calls.Softmax(problem.scale, piece.is_causal, views.bias, drop)


def _views(problem: Problem, operands: Operands, branch: int | None) -> Iterator[tuple[Piece, Operands]]:
    """Every piece with its views `(b, H, L, D)` of all operands.

    Query heads of a group take turns: heads `g, g + G, ...` pair off with k's heads. Where the strides of batch and
    segment do not fit together in one dimension, the shorter of the two is walked.
    """
    kv_heads = operands.k.shape[2]
    num_queries, num_keys = operands.q.shape[1], operands.k.shape[1]
    given = [(name, x) for name, x in zip(Operands._fields, operands, strict=True) if x is not None]
    for group in range(operands.q.shape[2] // kv_heads):
        # (B, N, H_kv, D) each
        tensors = [
            (n, x.unflatten(2, (kv_heads, -1))[:, :, :, group] if x.shape[2] > kv_heads else x) for n, x in given
        ]
        for piece in pieces(problem, num_queries, num_keys):
            if branch is None or piece.branch == branch:
                for views in _piece_views(piece, tensors):
                    yield piece, views


def _piece_views(piece: Piece, tensors: list[tuple[str, Tensor]]) -> Iterator[Operands]:
    """The piece's views of the tensors given by name, once or several times."""
    views: dict[str, Tensor] = {}  # (B, segments, slots, heads, D)
    for name, x in tensors:
        rows = piece.keys if name in _OF_KEYS else piece.queries if name in _OF_READ_QUERIES else piece.outputs
        if rows is not None:
            views[name] = rows.of(x, _ALL if name in _WITHOUT_HEADS else piece.heads)
    if piece.queries is None:
        views["q"] = torch.zeros_like(views["out"], dtype=views["k"].dtype)
    batch, segments = views["k"].shape[:2]
    if 1 in (batch, segments) or all(x.stride(0) == segments * x.stride(1) for x in views.values()):
        yield Operands(**{n: x.view(batch * segments, *x.shape[2:]).transpose(1, 2) for n, x in views.items()})
    elif batch <= segments:
        for b in range(batch):
            yield Operands(**{name: x[b].transpose(1, 2) for name, x in views.items()})
    else:
        for s in range(segments):
            yield Operands(**{name: x[:, s].transpose(1, 2) for name, x in views.items()})


def _parts(x: QKV, problem: Problem, masks: Masks) -> Iterator[BatchPart]:
    num_queries = x.q.shape[1]
    bounds = None if masks.cu_seqlens is None else masks.cu_seqlens.tolist()
    if bounds is not None:
        check_cu_seqlens_values(bounds, num_queries)
    if x.q.shape[0] == 0 or num_queries == 0:
        return
    if bounds is not None:
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start < stop:
                rows = slice(start, stop)
                first = problem.q_start  # of every sequence: 0, or a segment shift
                yield BatchPart(problem.at(first, first, first + stop - start), _ALL, rows, rows, i)
    elif masks.row_start is not None:
        for b, first in enumerate(masks.row_start.tolist()):
            # Positions count from the row's first real token; what lies before it is nobody's query or key.
            q_skip, k_skip = max(0, first - problem.q_start), max(0, first - problem.k_start)
            moved = problem.at(
                max(0, problem.q_start - first), max(0, problem.k_start - first), max(0, problem.seq_len - first)
            )
            if q_skip < num_queries:
                yield BatchPart(moved, slice(b, b + 1), slice(q_skip, None), slice(k_skip, None), b)
    else:
        yield BatchPart(problem, _ALL, _ALL, _ALL, 0)


def _with_dropout(part: BatchPart, operands: Operands, seed: Tensor | None) -> Operands:
    """The operands with what dropout needs to know of queries and keys, which are hashed by their positions."""
    if seed is None:
        return operands
    batch, num_queries, num_heads, _ = operands.q.shape
    num_keys, device = operands.k.shape[1], operands.q.device
    index = torch.arange(max(batch, num_heads, num_queries, num_keys), device=device)
    sequence = (part.first_sequence + index[:batch])[:, None, None, None]
    position = (part.problem.q_start + index[:num_queries])[:, None, None]
    q_state = dropout.row_state(seed.to(device), sequence, index[:num_heads, None], position)
    k_position = (part.problem.k_start + index[:num_keys])[:, None, None].repeat(batch, 1, 1, 1)
    return operands._replace(q_state=q_state, k_position=k_position)


def _bias(problem: Problem, masks: Masks, k: Tensor) -> Tensor | None:
    """0 for a real key and -inf for a masked one, `(B, Nk, 1, 1)`."""
    if masks.key_padding is None:
        return None
    real = masks.key_padding[:, problem.k_start : problem.k_start + k.shape[1], None, None]
    return torch.zeros(real.shape, dtype=k.dtype, device=k.device).masked_fill_(~real, -torch.inf)


def _ready(x: Tensor) -> Tensor:
    """Each row's D values side by side and no element shared by two rows, as torch's kernels want them.

    Where rows overlap (`unfold`), torch's CPU kernel makes its output with the input's strides: two rows of the result
    would share memory.
    """
    return x if x.is_contiguous() or (x.stride(-1) == 1 and _is_disjoint(x)) else x.contiguous()


def _is_disjoint(x: Tensor) -> bool:
    """False if any stride lies strictly between 0 and the extent that it has to step over."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride > 0:
            if stride < extent:
                return False
            extent += stride * (size - 1)
    return True


def _empty_result(q: Tensor) -> AttentionOutput:
    dtype = accumulator(q.dtype)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype)
    return AttentionOutput(q.new_zeros(q.shape, dtype=dtype), lse)
