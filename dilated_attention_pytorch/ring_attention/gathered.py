"""Mode "gather": every rank fetches all of K and V. No plan of rows, no pieces: what the other modes are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.ring_attention.plan import RingPlan
from dilated_attention_pytorch.ring_attention.step import Gradients, Step
from dilated_attention_pytorch.ring_attention.utils import buffers
from dilated_attention_pytorch.ring_attention.utils.communication import Channel, Pending
from dilated_attention_pytorch.types import AttentionOutput


def forward(
    plan: RingPlan, problem: Problem, step: Step, channel: Channel, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, seed: Tensor | None, *, keep: bool,
) -> tuple[AttentionOutput, Tensor]:  # fmt: skip
    """The part of all keys as the step gives it, and what arrived (empty unless it is kept)."""
    arriving = _gather(plan, channel, k, v, keep=keep)
    gathered = arriving.wait()
    keys, values = _whole(plan, gathered)
    arriving.release()
    whole = problem.at(problem.q_start, 0, plan.seq_len)
    out, lse = step.forward(q, keys, values, whole, key_padding_mask=_gather_mask(plan, channel, mask), seed=seed)
    return AttentionOutput(out, lse.contiguous()), gathered.flatten() if keep else k.new_empty(0)


def backward(
    plan: RingPlan, problem: Problem, step: Step, channel: Channel, wire_dtype: torch.dtype, grad_out: Tensor,
    grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Tensor,
    mask: Tensor | None, seed: Tensor | None, *, keep: bool,
) -> Gradients:  # fmt: skip
    """As `schedule.backward`: each rank's share of dK and dV goes to the owners, who sum in rank order."""
    batch, _, heads, width = k.shape
    longest = max(plan.lengths)
    shape = (plan.world_size, 2, batch, longest, heads, width)
    arriving = None if keep else _gather(plan, channel, k, v, keep=False)
    keys, values = _whole(plan, kept.view(shape) if arriving is None else arriving.wait())
    if arriving is not None:
        arriving.release()
    dq, dk, dv = step.backward(
        grad_out,
        grad_lse,
        q,
        keys,
        values,
        out,
        lse,
        problem.at(problem.q_start, 0, plan.seq_len),
        key_padding_mask=_gather_mask(plan, channel, mask),
        seed=seed,
    )
    accumulator = torch.promote_types(k.dtype, torch.float32)
    shares = torch.stack((dk, dv), 2).transpose(0, 1).to(accumulator)  # (N, B, 2, H_kv, D)
    start, stop = plan.shard
    own = shares[start:stop]
    lengths = list(plan.lengths)
    lengths[plan.rank] = 0  # a rank's own share stays at home, unrounded
    away = buffers.borrow((shares.shape[0] - stop + start, *shares.shape[1:]), wire_dtype, k.device, "gradients sent")
    away.tensor[:start], away.tensor[start:] = shares[:start], shares[stop:]
    others = [0 if p == plan.rank else stop - start for p in range(plan.world_size)]
    homecoming = channel.exchange(away, lengths, others, "gradients")
    arrived = homecoming.wait().to(accumulator)
    parts = list(arrived.split([n for p, n in enumerate(others) if p != plan.rank]))
    parts.insert(plan.rank, own)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    homecoming.release()
    # Of their own each: an op may not return two views of one tensor.
    dk, dv = (total[:, :, i].transpose(0, 1).clone(memory_format=torch.contiguous_format) for i in (0, 1))
    return dq, dk, dv


def _gather(plan: RingPlan, channel: Channel, k: Tensor, v: Tensor, *, keep: bool) -> Pending:
    """All shards, padded to the longest: `(P, 2, B, n, H_kv, D)`."""
    longest = max(plan.lengths)
    padded = buffers.borrow((2, k.shape[0], longest, *k.shape[2:]), k.dtype, k.device, "rows sent", zero=True)
    padded.tensor[0, :, : k.shape[1]], padded.tensor[1, :, : k.shape[1]] = k, v
    return channel.gather(padded, "rows", keep=keep)


def _whole(plan: RingPlan, gathered: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of the whole sequence."""
    rows = torch.cat([shard[:, :, :n] for shard, n in zip(gathered, plan.lengths, strict=True)], 2)
    return rows[0], rows[1]


def _gather_mask(plan: RingPlan, channel: Channel, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    arriving = channel.gather(buffers.padded_mask(mask, max(plan.lengths)), "mask")
    whole = torch.cat([shard[:, :n] for shard, n in zip(arriving.wait(), plan.lengths, strict=True)], 1)
    arriving.release()
    return whole
