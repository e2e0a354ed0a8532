"""What happens in which order: exchanges start first, local attention runs while they fly, remote rows come last.

The backward gives every part the *global* out and lse, so each part's gradients are exact by themselves; gradients of
remote rows go home by the plan read backwards and are summed there rank by rank, so results do not depend on timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.core.memory.handle import Handle
from dilated_attention_pytorch.core.merge import rows_last
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.ring_attention import gathered, remote
from dilated_attention_pytorch.ring_attention.plan import RingPlan
from dilated_attention_pytorch.ring_attention.remote import Extras
from dilated_attention_pytorch.ring_attention.step import Gradients, Step
from dilated_attention_pytorch.ring_attention.utils import buffers
from dilated_attention_pytorch.ring_attention.utils.communication import Channel, Pending
from dilated_attention_pytorch.ring_attention.utils.lse import LSEAccumulator
from dilated_attention_pytorch.types import AttentionOutput


@dataclass(frozen=True)
class Call:
    """One call on one rank, tensors taken away.

    Attributes:
        plan: which rows travel.
        problem: the settings, with this rank's range.
        mode: "sparse", "ring" or "gather".
        step: how parts are computed.
        channel: what exchanges go through.
        wire_dtype: what gradients travel in.
        keep: whether the forward gives back what arrived, for the backward.
        zero_keys: whether softmaxes count the official code's zero keys. The backward does not ask: their values and
            gradients are 0, and the lse that it is given counts them.
    """

    plan: RingPlan
    problem: Problem
    mode: str
    step: Step
    channel: Channel
    wire_dtype: torch.dtype
    keep: bool
    zero_keys: bool

    def rounds(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The exchanges, each as (peers that rows come from, peers that rows go to)."""
        plan = self.plan
        if not plan.anything_moves:
            return []
        if self.mode == "sparse":
            return [(plan.peers, plan.peers)]
        size = plan.world_size
        return [(((plan.rank - hop) % size,), ((plan.rank + hop) % size,)) for hop in range(1, size)]


def forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None
) -> tuple[AttentionOutput, Tensor]:
    """Attention of this rank's queries over all ranks' keys, and what arrived (empty unless it is kept)."""
    if call.mode == "gather":
        found, kept = gathered.forward(
            call.plan, call.problem, call.step, call.channel, q, k, v, mask, seed, keep=call.keep
        )
        return _rounded(found, _accumulator(call, found, receives=False), q.dtype), kept
    problem = call.problem
    rounds = call.rounds()
    keep = call.keep and call.mode == "sparse"
    pending = _fetch(call, k, v, rounds[0], keep=keep) if rounds else None
    bits = _start_mask(call, mask) if rounds else None
    own_mask = _own_mask(call.plan, mask)
    local = AttentionOutput(*call.step.forward(q, k, v, problem, key_padding_mask=own_mask, seed=seed))
    merged = _accumulator(call, local, receives=bool(rounds) and call.plan.receives)
    if not rounds:
        return _rounded(local, merged, q.dtype), k.new_empty(0)
    units = k.new_empty(0)
    extras = Extras(_hidden(call.plan, bits), seed)
    for number, (owners, _) in enumerate(rounds):
        assert pending is not None
        arrived, units = pending, pending.wait()
        if number + 1 < len(rounds):
            pending = _fetch(call, k, v, rounds[number + 1], keep=keep)
        if merged is not None and call.plan.receives:
            remote.attend(call.step, call.plan, owners, q, units, problem, extras, merged)
        arrived.release()
    kept = units.flatten() if keep else k.new_empty(0)
    if merged is not None and mask is not None:
        merged.hide(~mask)
    return _rounded(local, merged, q.dtype), kept


def _accumulator(call: Call, part: AttentionOutput, *, receives: bool) -> LSEAccumulator | None:
    """What other keys are merged into, zero keys first; None where none come on top of the part's."""
    if not receives and not call.zero_keys:
        return None
    plan, (out, lse) = call.plan, part
    merged = LSEAccumulator(part, plan.pattern.num_heads)
    if call.zero_keys:
        counts = plan.num_zero_keys.repeat_interleave(out.shape[2] // plan.pattern.num_heads, 0)
        log_counts = counts.to(torch.promote_types(lse.dtype, torch.float32)).log()
        merged.add(AttentionOutput(out.new_zeros(()).expand_as(out), log_counts.expand_as(lse)))
    return merged


def _rounded(part: AttentionOutput, merged: LSEAccumulator | None, dtype: torch.dtype) -> AttentionOutput:
    """The result in the query's dtype, rounded once: the accumulator's, or the part itself where it is all."""
    return AttentionOutput(part.out.to(dtype), part.lse) if merged is None else merged.result(dtype)


def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    kept: Tensor, mask: Tensor | None, seed: Tensor | None,
) -> Gradients:  # fmt: skip
    """Gradients of this rank's q, k and v."""
    if call.mode == "gather":
        return gathered.backward(
            call.plan, call.problem, call.step, call.channel, call.wire_dtype, grad_out, grad_lse, q, k, v, out, lse,
            kept, mask, seed, keep=call.keep,
        )  # fmt: skip
    rounds = call.rounds()
    is_kept = call.keep and call.mode == "sparse"
    if not rounds:
        own_mask = _own_mask(call.plan, mask)
        return call.step.backward(
            grad_out, grad_lse, q, k, v, out, lse, call.problem, key_padding_mask=own_mask, seed=seed
        )
    pending = None if is_kept else _fetch(call, k, v, rounds[0])
    bits = _start_mask(call, mask)
    # Rows that were kept need no waiting: they come first, so that their gradients fly while local ones are computed.
    local = None if is_kept else _local_backward(call, grad_out, grad_lse, q, k, v, out, lse, mask, seed)
    extras = Extras(_hidden(call.plan, bits), seed)
    of_queries: list[remote.QueryGradient] = []
    rows_lse = rows_last(lse.masked_fill(torch.isneginf(lse), torch.inf))
    rows_grad_lse = None if grad_lse is None else rows_last(grad_lse)
    homeward: list[tuple[Pending, tuple[int, ...]]] = []
    for number, (owners, receivers) in enumerate(rounds):
        arrived = pending
        if is_kept:
            units = kept.view(sum(_counts(call, owners, arriving=True)), k.shape[0], 2, k.shape[3])
        else:
            assert pending is not None
            units = pending.wait()
            if number + 1 < len(rounds):
                pending = _fetch(call, k, v, rounds[number + 1])
        grads, more = remote.differentiate(
            call.step, call.plan, owners, grad_out, rows_grad_lse, q, units, out, rows_lse, call.problem, extras
        )
        if arrived is not None:
            arrived.release()
        of_queries += more
        homeward.append((_send_home(call, grads, owners, receivers), receivers))
        if len(homeward) > 1:  # bounds the memory of a ring: one round's gradients fly at a time
            local = _add(call, local, homeward.pop(0))
    if local is None:
        local = _local_backward(call, grad_out, grad_lse, q, k, v, out, lse, mask, seed)
    for flying in homeward:
        local = _add(call, local, flying)
    remote.add_queries(local[0], k.shape[2], of_queries)
    return local


def _local_backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, seed: Tensor | None,
) -> Gradients:  # fmt: skip
    """Gradients of the local part; those that remote parts are added to in fp32 (fp64), contiguous."""
    grads = call.step.backward(
        grad_out, grad_lse, q, k, v, out, lse, call.problem, key_padding_mask=_own_mask(call.plan, mask), seed=seed
    )
    accumulator = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = grads
    if call.plan.receives:
        dq = dq.to(accumulator).contiguous()
    if call.plan.gives:
        dk, dv = dk.to(accumulator).contiguous(), dv.to(accumulator).contiguous()
    return dq, dk, dv


def _counts(call: Call, peers: tuple[int, ...], *, arriving: bool) -> list[int]:
    units = call.plan.arriving if arriving else call.plan.leaving
    return [units[p].count if p in peers else 0 for p in range(call.plan.world_size)]


def _fetch(
    call: Call, k: Tensor, v: Tensor, peers: tuple[tuple[int, ...], tuple[int, ...]], *, keep: bool = False
) -> Pending:
    """Starts to send what the receivers need and to receive what the owners hold."""
    owners, receivers = peers
    index = call.plan.leaving_index
    rows = torch.cat([index[p][0] for p in receivers]), torch.cat([index[p][1] for p in receivers])
    sent, received = _counts(call, receivers, arriving=False), _counts(call, owners, arriving=True)
    return call.channel.exchange(remote.pack(k, v, rows), sent, received, "rows", keep)


def _send_home(call: Call, grads: Handle, owners: tuple[int, ...], receivers: tuple[int, ...]) -> Pending:
    """The same exchange backwards: what came from an owner goes to it."""
    if grads.tensor.dtype != call.wire_dtype:
        with grads as exact:
            grads = buffers.borrow(exact.tensor.shape, call.wire_dtype, exact.tensor.device, "gradients sent")
            grads.tensor.copy_(exact.tensor)
    sent, received = _counts(call, owners, arriving=True), _counts(call, receivers, arriving=False)
    return call.channel.exchange(grads, sent, received, "gradients")


def _add(call: Call, local: Gradients | None, flying: tuple[Pending, tuple[int, ...]]) -> Gradients:
    """Waits for gradients that come home and adds them to this rank's own."""
    assert local is not None
    grads, receivers = flying[0].wait(), flying[1]
    for peer, part in _by_peer(call, grads, receivers) if call.plan.gives else ():
        remote.add_home(local[1], local[2], call.plan.leaving_index[peer], part)
    flying[0].release()
    return local


def _by_peer(call: Call, grads: Tensor, peers: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """Peer by peer: no unit is in one peer's part twice, so each sum has a fixed order."""
    first = 0
    for peer in peers:
        count = call.plan.leaving[peer].count
        yield peer, grads[first : first + count]
        first += count


def _start_mask(call: Call, mask: Tensor | None) -> Pending | None:
    """Starts to gather every rank's mask bits: a byte a position, padded to the longest shard."""
    if mask is None:
        return None
    return call.channel.gather(buffers.padded_mask(mask, max(call.plan.lengths)), "mask")


def _hidden(plan: RingPlan, bits: Pending | None) -> Tensor | None:
    """`(B, N)`, True where a key is hidden."""
    if bits is None:
        return None
    shards = bits.wait()
    hidden = ~torch.cat([shard[:, :n] for shard, n in zip(shards, plan.lengths, strict=True)], 1)
    bits.release()
    return hidden


def _own_mask(plan: RingPlan, mask: Tensor | None) -> Tensor | None:
    """This rank's bits at their place in a mask of the whole sequence, of which a partial call reads no more."""
    if mask is None:
        return None
    start, stop = plan.shard
    return torch.nn.functional.pad(mask, (start, plan.seq_len - stop))
