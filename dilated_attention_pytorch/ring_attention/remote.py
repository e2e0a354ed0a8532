"""Attention over rows that arrived from other ranks, and the gradients that go back to them.

What arrives is a tensor of units `(U, B, 2, D)`: K and V of one position and key/value head. A remote key is earlier
than all of the shard or later than all of it, so what meets is a rectangle of queries and keys without a causal mask:
plain attention, which a backend computes as a `Problem` of one segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import dropout
from dilated_attention_pytorch.core.memory.handle import Handle
from dilated_attention_pytorch.core.merge import rows_last
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import one_segment
from dilated_attention_pytorch.kernels.sdpa import torch_calls
from dilated_attention_pytorch.kernels.sdpa.torch_calls import Softmax
from dilated_attention_pytorch.ring_attention.call import RingCall
from dilated_attention_pytorch.ring_attention.plan import Rectangle
from dilated_attention_pytorch.ring_attention.utils import buffers
from dilated_attention_pytorch.ring_attention.utils.lse import LSEAccumulator
from dilated_attention_pytorch.types import QKV, AttentionOutput, Masks, OutputGradient


class QueryGradient(NamedTuple):
    """What a rectangle adds to the gradient of its queries, `(B, h, Lq, G, D)`; compact until dq itself exists."""

    rectangle: Rectangle
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
    call: RingCall, owners: tuple[int, ...], q: Tensor, units: Tensor, masks: Masks, merged: LSEAccumulator
) -> None:
    """Merges attention of q `(B, n, H, D)` over the units of some peers; masks are of the whole sequence."""
    group = q.shape[2] // call.plan.pattern.num_heads
    for rectangle in call.plan.rectangles(owners):
        # (B, h, Lq * G, D) over (B, h, Lk, D)
        rows = QKV(_queries(call, q, rectangle), *_keys(units, rectangle))
        out, lse = _forward(call, rows, _softmax(call, owners, rectangle, q, masks))
        # (Lq, G)
        shape = (rectangle.queries.shape[1], group)
        merged.add_rows(rectangle.queries, rectangle.heads, out.unflatten(2, shape), lse.unflatten(2, shape))


def differentiate(
    call: RingCall, owners: tuple[int, ...], grad: OutputGradient, q: Tensor, units: Tensor, saved: AttentionOutput,
    masks: Masks,
) -> tuple[Handle, list[QueryGradient]]:  # fmt: skip
    """Gradients of the units of some peers, `(U, B, 2, D)` in fp32 (fp64), to be sent; and what they add to dq.
    The gradient and what was saved are over all keys; lse +inf where a query sees no key."""
    buffer = buffers.borrow(units.shape, accumulator(q.dtype), q.device, "gradients sent", zero=True)
    of_queries: list[QueryGradient] = []
    for rectangle in call.plan.rectangles(owners):
        rows = QKV(_queries(call, q, rectangle), *_keys(units, rectangle))
        more_lse = None if grad.lse is None else _queries(call, rows_last(grad.lse), rectangle)
        more = OutputGradient(_queries(call, grad.out, rectangle), more_lse)
        known = AttentionOutput(*(_queries(call, x, rectangle) for x in (saved.out, rows_last(saved.lse))))
        dq, dk, dv = _backward(call, more, rows, known, _softmax(call, owners, rectangle, q, masks))
        of_queries.append(QueryGradient(rectangle, dq.unflatten(2, (rectangle.queries.shape[1], -1))))
        # No unit is in a rectangle twice, so the sums have one order, whichever way they are added.
        # (B, h, Lk, 2, D)
        of_keys = torch.stack((dk, dv), -2).to(buffer.tensor.dtype)
        buffer.tensor.index_add_(0, rectangle.keys.flatten(), of_keys.flatten(1, 2).transpose(0, 1))
    return buffer, of_queries


def add_queries(dq: Tensor, num_kv_heads: int, parts: list[QueryGradient]) -> None:
    """Adds what rectangles contribute to dq `(B, n, H, D)`; no query is in a rectangle twice."""
    # (B, n, H_kv, G, D)
    rows = dq.unflatten(2, (num_kv_heads, -1))
    for rectangle, grads in parts:
        at = (slice(None), rectangle.queries, rectangle.heads[:, None])
        rows[at] = rows[at] + grads.to(dq.dtype)


def _forward(call: RingCall, rows: QKV, how: Softmax) -> AttentionOutput:
    """Attention of rows `(B, h, L, D)`: out like q, lse `(B, h, Lq, 1)`."""
    if how.bias is not None or how.drop is not None:
        # Masks and dropout follow positions, which rows of one segment no longer tell.
        return torch_calls.forward(rows, how)
    problem = one_segment(rows.q.shape[2], rows.k.shape[2], rows.k.shape[1], how.scale)
    out, lse = call.backend.forward(QKV(*(x.transpose(1, 2) for x in rows)), problem)
    return AttentionOutput(out.transpose(1, 2), lse.unsqueeze(-1))


def _backward(call: RingCall, grad: OutputGradient, rows: QKV, saved: AttentionOutput, how: Softmax) -> QKV:
    """Gradients of rows, laid out as in `_forward`."""
    if how.bias is not None or how.drop is not None:
        return torch_calls.backward(grad, rows, saved, how)
    problem = one_segment(rows.q.shape[2], rows.k.shape[2], rows.k.shape[1], how.scale)
    grads = call.backend.backward(
        OutputGradient(grad.out.transpose(1, 2), None if grad.lse is None else grad.lse.squeeze(-1)),
        QKV(*(x.transpose(1, 2) for x in rows)),
        AttentionOutput(saved.out.transpose(1, 2), saved.lse.squeeze(-1)),
        problem,
    )
    return QKV(*(x.transpose(1, 2) for x in grads))


def _queries(call: RingCall, x: Tensor, rectangle: Rectangle) -> Tensor:
    """Rows of x `(B, n, H, d)` as `(B, h, Lq * G, d)`: query heads of one key head share its keys."""
    # (B, n, H_kv, G, d)
    x = x.unflatten(2, (call.plan.pattern.num_heads, -1))
    return x[:, rectangle.queries, rectangle.heads[:, None]].flatten(2, 3)


def _keys(units: Tensor, rectangle: Rectangle) -> tuple[Tensor, Tensor]:
    """K and V of the rectangle, `(B, h, Lk, D)` each: views of one gathered tensor."""
    rows = units.index_select(0, rectangle.keys.flatten()).unflatten(0, rectangle.keys.shape)
    # (2, B, h, Lk, D)
    rows = rows.permute(3, 2, 0, 1, 4)
    return rows[0], rows[1]


def _softmax(call: RingCall, owners: tuple[int, ...], rectangle: Rectangle, q: Tensor, masks: Masks) -> Softmax:
    """How a rectangle's logits become weights: its keys' mask bits, and dropout by the positions of both sides."""
    if masks.key_padding is None and masks.seed is None:
        return Softmax(call.problem.scale)
    plan, bias, drop = call.plan, None, None
    # (h, Lk)
    positions = torch.cat([plan.arriving_positions[o] for o in owners])[rectangle.keys]
    if masks.key_padding is not None:
        # (B, h, Lk, 1)
        hidden = ~masks.key_padding[:, positions].unsqueeze(-1)
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    if masks.seed is not None:
        batch, _, num_heads, _ = q.shape
        group = num_heads // plan.pattern.num_heads
        sequence = torch.arange(batch, device=q.device)[:, None, None, None]
        # (h, 1, G)
        head = (rectangle.heads[:, None] * group + torch.arange(group, device=q.device))[:, None]
        # (h, Lq, 1)
        position = (rectangle.queries + plan.shard[0])[:, :, None]
        state = dropout.row_state(masks.seed.to(q.device), sequence, head, position).flatten(2, 3).unsqueeze(-1)
        keys = positions[None, :, :, None].expand(batch, -1, -1, -1)
        drop = torch_calls.Dropout(dropout.absorb(state, rectangle.branch), keys, call.problem.dropout_p)
    return Softmax(call.problem.scale, bias=bias, drop=drop)
