"""Attention over rows that arrived from other ranks, and the gradients that go back to them.

What arrives is a tensor of units `(U, B, 2, D)`: K and V of one position and key/value head. A remote key is earlier
than all of the shard or later than all of it, so each piece is a rectangle without a causal mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import dropout
from dilated_attention_pytorch.core.memory.handle import Handle
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.sdpa import torch_calls
from dilated_attention_pytorch.ring_attention.plan import Piece, RingPlan
from dilated_attention_pytorch.ring_attention.step import Step
from dilated_attention_pytorch.ring_attention.utils import buffers
from dilated_attention_pytorch.ring_attention.utils.lse import LSEAccumulator


class Extras(NamedTuple):
    """What masks and dropout know of units and queries.

    Attributes:
        masked: bool `(B, N)`, True where a key is hidden, of the whole sequence; None without a mask.
        seed: int64 scalar; None without dropout.
    """

    masked: Tensor | None
    seed: Tensor | None


class QueryGradient(NamedTuple):
    """What one piece contributes to the gradient of its queries, `(B, h, Lq, G, D)`; compact until dq itself exists."""

    piece: Piece
    grads: Tensor


def pack(k: Tensor, v: Tensor, index: tuple[Tensor, Tensor]) -> Handle:
    """The units at (rows, heads) of k and v `(B, n, H_kv, D)`: `(U, B, 2, D)`, in a buffer to be sent."""
    rows, heads = index
    buffer = buffers.borrow((len(rows), k.shape[0], 2, k.shape[3]), k.dtype, k.device, "rows sent")
    units = buffer.tensor
    for i, x in enumerate((k, v)):
        if x.shape[0] == 1 and x.stride(1) == x.shape[2] * x.stride(2):
            # One index into one dimension of whole rows, for which CUDA has a kernel with wide loads.
            units[:, 0, i] = x[0].flatten(0, 1)[rows * x.shape[2] + heads]
        else:
            units[:, :, i] = x[:, rows, heads].transpose(0, 1)
    return buffer


def add_home(dk: Tensor, dv: Tensor, index: tuple[Tensor, Tensor], grads: Tensor) -> None:
    """Adds the gradients `(U, B, 2, D)` of the units at (rows, heads) to dk and dv `(B, n, H_kv, D)`, contiguous."""
    rows, heads = index
    flat = rows * dk.shape[2] + heads
    grads = grads.to(dk.dtype)
    dk.flatten(1, 2).index_add_(1, flat, grads[:, :, 0].transpose(0, 1))
    dv.flatten(1, 2).index_add_(1, flat, grads[:, :, 1].transpose(0, 1))


def attend(
    step: Step, plan: RingPlan, owners: tuple[int, ...], q: Tensor, units: Tensor, problem: Problem, extras: Extras,
    merged: LSEAccumulator,
) -> None:  # fmt: skip
    """Merges attention of q `(B, n, H, D)` over the units of some peers."""
    for piece in plan.pieces(owners):
        queries, (keys, values) = _queries(q, piece, plan), _keys(units, piece)
        bias, drop = _extras(plan, owners, piece, q, problem, extras)
        out, lse = step.rows_forward(queries, keys, values, scale=problem.scale, bias=bias, drop=drop)
        group = q.shape[2] // plan.pattern.num_heads
        shape = (piece.queries.shape[1], group)
        merged.add_rows(piece.queries, piece.heads, out.unflatten(2, shape), lse.unflatten(2, shape))


def differentiate(
    step: Step, plan: RingPlan, owners: tuple[int, ...], grad_out: Tensor, grad_lse: Tensor | None, q: Tensor,
    units: Tensor, out: Tensor, lse: Tensor, problem: Problem, extras: Extras,
) -> tuple[Handle, list[QueryGradient]]:  # fmt: skip
    """Gradients of the units of some peers, `(U, B, 2, D)` in fp32 (fp64), to be sent; and what they add to dq.

    Args:
        grad_out, q, out: `(B, n, H, D)`.
        grad_lse, lse: `(B, n, H, 1)`; lse +inf where a query sees no key.
    """
    accumulator = torch.promote_types(q.dtype, torch.float32)
    buffer = buffers.borrow(units.shape, accumulator, q.device, "gradients sent", zero=True)
    grads = buffer.tensor
    of_queries: list[QueryGradient] = []
    for piece in plan.pieces(owners):
        keys, values = _keys(units, piece)
        bias, drop = _extras(plan, owners, piece, q, problem, extras)
        more_dq, more_dk, more_dv = step.rows_backward(
            _queries(grad_out, piece, plan),
            None if grad_lse is None else _queries(grad_lse, piece, plan),
            _queries(q, piece, plan),
            keys,
            values,
            _queries(out, piece, plan),
            _queries(lse, piece, plan),
            scale=problem.scale,
            bias=bias,
            drop=drop,
        )
        of_queries.append(QueryGradient(piece, more_dq.unflatten(2, (piece.queries.shape[1], -1))))
        # No unit is in a piece twice, so the sums have one order, whichever way they are added.
        more = torch.stack((more_dk, more_dv), -2).to(grads.dtype)  # (B, h, Lk, 2, D)
        grads.index_add_(0, piece.keys.flatten(), more.flatten(1, 2).transpose(0, 1))
    return buffer, of_queries


def add_queries(dq: Tensor, num_kv_heads: int, parts: list[QueryGradient]) -> None:
    """Adds what pieces contribute to dq `(B, n, H, D)`; no query is in a piece twice."""
    rows = dq.unflatten(2, (num_kv_heads, -1))
    for piece, grads in parts:
        at = (slice(None), piece.queries, piece.heads[:, None])
        rows[at] = rows[at] + grads.to(dq.dtype)


def _queries(x: Tensor, piece: Piece, plan: RingPlan) -> Tensor:
    """Rows of x `(B, n, H, d)` as `(B, h, Lq * G, d)`: query heads of one key head share its keys."""
    x = x.unflatten(2, (plan.pattern.num_heads, -1))
    return x[:, piece.queries, piece.heads[:, None]].flatten(2, 3)


def _keys(units: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """K and V of the piece, `(B, h, Lk, D)` each: views of one gathered tensor."""
    rows = units.index_select(0, piece.keys.flatten()).unflatten(0, piece.keys.shape)
    rows = rows.permute(3, 2, 0, 1, 4)
    return rows[0], rows[1]


def _extras(
    plan: RingPlan, owners: tuple[int, ...], piece: Piece, q: Tensor, problem: Problem, extras: Extras
) -> tuple[Tensor | None, torch_calls.Dropout | None]:
    if extras.masked is None and extras.seed is None:
        return None, None
    positions = torch.cat([plan.arriving_positions[o] for o in owners])[piece.keys]  # (h, Lk)
    bias = drop = None
    if extras.masked is not None:
        hidden = extras.masked[:, positions].unsqueeze(-1)
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    if extras.seed is not None:
        batch, _, num_heads, _ = q.shape
        group = num_heads // plan.pattern.num_heads
        sequence = torch.arange(batch, device=q.device)[:, None, None, None]
        head = (piece.heads[:, None] * group + torch.arange(group, device=q.device))[:, None]  # (h, 1, G)
        position = (piece.queries + plan.shard[0])[:, :, None]
        state = dropout.row_state(extras.seed.to(q.device), sequence, head, position).flatten(2, 3).unsqueeze(-1)
        keys = positions[None, :, :, None].expand(batch, -1, -1, -1)
        drop = torch_calls.Dropout(dropout.absorb(state, piece.branch), keys, problem.dropout_p)
    return bias, drop
