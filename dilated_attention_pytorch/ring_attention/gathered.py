"""Mode "gather": every rank fetches all of K and V. No plan of rows, no pieces: what the other modes are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.ring_attention.plan import RingPlan
from dilated_attention_pytorch.ring_attention.step import Gradients, Step
from dilated_attention_pytorch.ring_attention.utils.communication import Channel
from dilated_attention_pytorch.types import AttentionOutput


def forward(
    plan: RingPlan, problem: Problem, step: Step, channel: Channel, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, seed: Tensor | None, *, keep: bool,
) -> tuple[AttentionOutput, Tensor]:  # fmt: skip
    """As `schedule.forward`."""
    gathered = _gather(plan, channel, k, v)
    keys, values = _whole(plan, gathered)
    whole = problem.at(problem.q_start, 0, plan.seq_len)
    out, lse = step.forward(q, keys, values, whole, key_padding_mask=_gather_mask(plan, channel, mask), seed=seed)
    lse = lse.contiguous()
    return AttentionOutput(out.to(q.dtype), lse), gathered.flatten() if keep else k.new_empty(0)


def backward(
    plan: RingPlan, problem: Problem, step: Step, channel: Channel, wire_dtype: torch.dtype, grad_out: Tensor,
    grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Tensor,
    mask: Tensor | None, seed: Tensor | None, *, keep: bool,
) -> Gradients:  # fmt: skip
    """As `schedule.backward`: each rank's share of dK and dV goes to the owners, who sum in rank order."""
    batch, _, heads, width = k.shape
    longest = max(plan.lengths)
    shape = (plan.world_size, 2, batch, longest, heads, width)
    gathered = kept.view(shape) if keep else _gather(plan, channel, k, v)
    keys, values = _whole(plan, gathered)
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
    away = torch.cat((shares[:start], shares[stop:])).to(wire_dtype)
    others = [0 if p == plan.rank else stop - start for p in range(plan.world_size)]
    arrived = channel.exchange(away, lengths, others, "gradients").wait().to(accumulator)
    parts = list(arrived.split([n for p, n in enumerate(others) if p != plan.rank]))
    parts.insert(plan.rank, own)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    # Of their own each: an op may not return two views of one tensor.
    dk, dv = (total[:, :, i].transpose(0, 1).clone(memory_format=torch.contiguous_format) for i in (0, 1))
    return dq, dk, dv


def _gather(plan: RingPlan, channel: Channel, k: Tensor, v: Tensor) -> Tensor:
    """All shards, padded to the longest: `(P, 2, B, n, H_kv, D)`."""
    longest = max(plan.lengths)
    padded = k.new_zeros((2, k.shape[0], longest, *k.shape[2:]))
    padded[0, :, : k.shape[1]], padded[1, :, : k.shape[1]] = k, v
    return channel.gather(padded, "rows").wait()


def _whole(plan: RingPlan, gathered: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of the whole sequence."""
    rows = torch.cat([shard[:, :, :n] for shard, n in zip(gathered, plan.lengths, strict=True)], 2)
    return rows[0], rows[1]


def _gather_mask(plan: RingPlan, channel: Channel, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    longest = max(plan.lengths)
    padded = torch.nn.functional.pad(mask, (0, longest - mask.shape[1]))
    shards = channel.gather(padded, "mask").wait()
    return torch.cat([shard[:, :n] for shard, n in zip(shards, plan.lengths, strict=True)], 1)
