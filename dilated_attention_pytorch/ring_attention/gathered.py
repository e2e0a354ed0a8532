"""Mode "gather": every rank fetches all of K and V. Without a plan of rows, it is what the other modes are held to."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.ring_attention.call import RingCall
from dilated_attention_pytorch.ring_attention.utils import buffers
from dilated_attention_pytorch.ring_attention.utils.communication import Pending
from dilated_attention_pytorch.types import QKV, AttentionOutput, Masks, OutputGradient


def forward(call: RingCall, x: QKV, masks: Masks) -> tuple[AttentionOutput, Tensor]:
    """The part of all keys as the backend gives it, and what arrived (empty unless it is kept)."""
    arriving = _gather(call, x, keep=call.keep)
    shards = arriving.wait()
    whole = _whole(call, x, shards)
    arriving.release()
    # The rank's own queries over the keys of the whole sequence: a partial range (docs/spec.md, 4).
    problem = call.problem.at(call.problem.q_start, call.plan.bounds[0], call.plan.seq_len)
    out, lse = call.backend.forward(whole, problem, whole_masks(call, masks, start_masks(call, masks)))
    return AttentionOutput(out, lse.contiguous()), shards.flatten() if call.keep else x.k.new_empty(0)


def backward(call: RingCall, grad: OutputGradient, x: QKV, saved: AttentionOutput, kept: Tensor, masks: Masks) -> QKV:
    """As `exchange.backward`: each rank's share of dK and dV goes to the owners, who sum in rank order."""
    plan, (batch, _, heads, width) = call.plan, x.k.shape
    arriving = None if call.keep else _gather(call, x, keep=False)
    shards = kept if arriving is None else arriving.wait()
    whole = _whole(call, x, shards.view(plan.world_size, 2, batch, max(plan.lengths), heads, width))
    if arriving is not None:
        arriving.release()
    problem = call.problem.at(call.problem.q_start, plan.bounds[0], plan.seq_len)
    dq, dk, dv = call.backend.backward(grad, whole, saved, problem, whole_masks(call, masks, start_masks(call, masks)))
    exact = accumulator(x.k.dtype)
    # (N, B, 2, H_kv, D)
    shares = torch.stack((dk, dv), 2).transpose(0, 1).to(exact)
    start, stop = (position - plan.bounds[0] for position in plan.shard)
    # A rank's own share stays at home, unrounded; the others' go to their owners.
    own = shares[start:stop]
    sent, received = list(plan.lengths), [stop - start] * plan.world_size
    sent[plan.rank] = received[plan.rank] = 0
    away = buffers.borrow((sum(sent), *shares.shape[1:]), call.wire_dtype, x.k.device, "gradients sent")
    away.tensor[:start], away.tensor[start:] = shares[:start], shares[stop:]
    homecoming = call.channel.exchange(away, sent, received, "gradients")
    parts = list(homecoming.wait().to(exact).split([n for p, n in enumerate(received) if p != plan.rank]))
    parts.insert(plan.rank, own)
    # In rank order, so that the sum does not depend on who was first.
    total = functools.reduce(Tensor.add_, parts[1:], parts[0].clone())
    homecoming.release()
    # Of their own each: an op may not return two views of one tensor.
    dk, dv = (total[:, :, i].transpose(0, 1).clone(memory_format=torch.contiguous_format) for i in (0, 1))
    return QKV(dq, dk, dv)


def start_masks(call: RingCall, masks: Masks) -> Pending | None:
    """Starts to gather every rank's mask bits, one byte per position, padded to the longest shard."""
    if (mask := masks.key_padding) is None:
        return None
    # Nobody reads the padding, which is cut off after the gather.
    padded = buffers.borrow((mask.shape[0], max(call.plan.lengths)), mask.dtype, mask.device, "mask sent", zero=True)
    padded.tensor[:, : mask.shape[1]] = mask
    return call.channel.gather(padded, "mask")


def whole_masks(call: RingCall, masks: Masks, bits: Pending | None) -> Masks:
    """The masks with key_padding `(B, end)` up to the sequence's end, once its bits are there."""
    if bits is None:
        return masks
    # Bits stand at their positions, which a segment shift starts later.
    whole = torch.cat([shard[:, :n] for shard, n in zip(bits.wait(), call.plan.lengths, strict=True)], 1)
    bits.release()
    return masks._replace(key_padding=torch.nn.functional.pad(whole, (call.plan.bounds[0], 0)))


def _gather(call: RingCall, x: QKV, *, keep: bool) -> Pending:
    """All shards, padded to the longest: `(P, 2, B, n, H_kv, D)`."""
    shape = (2, x.k.shape[0], max(call.plan.lengths), *x.k.shape[2:])
    padded = buffers.borrow(shape, x.k.dtype, x.k.device, "rows sent", zero=True)
    padded.tensor[0, :, : x.k.shape[1]], padded.tensor[1, :, : x.k.shape[1]] = x.k, x.v
    return call.channel.gather(padded, "rows", keep=keep)


def _whole(call: RingCall, x: QKV, shards: Tensor) -> QKV:
    """This rank's queries with K and V of the whole sequence."""
    # (2, B, N, H_kv, D)
    rows = torch.cat([shard[:, :, :n] for shard, n in zip(shards, call.plan.lengths, strict=True)], 2)
    return QKV(x.q, rows[0], rows[1])
