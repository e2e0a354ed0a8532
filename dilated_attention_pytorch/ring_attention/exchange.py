"""The loop of a ring: exchanges start first, local attention runs while they fly, remote rows come last.

The backward gives every part the *global* out and lse, so each part's gradients are exact by themselves; gradients of
remote rows go home by the plan read backwards and are summed there rank by rank, so results do not depend on timing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from dilated_attention_pytorch.core.memory.handle import Handle
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.ring_attention import gathered, remote
from dilated_attention_pytorch.ring_attention.call import Hop, RingCall
from dilated_attention_pytorch.ring_attention.utils import buffers
from dilated_attention_pytorch.ring_attention.utils.communication import Pending
from dilated_attention_pytorch.ring_attention.utils.lse import LSEAccumulator
from dilated_attention_pytorch.types import QKV, AttentionOutput, Masks, OutputGradient


def forward(call: RingCall, x: QKV, masks: Masks) -> tuple[AttentionOutput, Tensor]:
    """Attention of this rank's queries over all ranks' keys, and what arrived (flat; empty unless it is kept).
    Inputs and masks are of this rank's shard: q `(B, n, H, D)`, key_padding `(B, n)`."""
    kept = x.k.new_empty(0)
    if call.mode == "gather":
        whole, kept = gathered.forward(call, x, masks)
        return _rounded(whole, _accumulate(call, whole, receives=False), x.q.dtype), kept
    # 1. Rows and mask bits leave.
    hops = call.hops()
    flying = _fetch(call, x, hops[0]) if hops else None
    bits = gathered.start_masks(call, masks) if hops else None
    # 2. This rank's queries over its own keys, while they fly.
    local = call.backend.forward(x, call.problem, _at_own_place(call, masks))
    merged = _accumulate(call, local, receives=call.plan.receives)
    # 3. Rows that arrived, one hop after another: the next hop's fly while these are computed.
    bits_of_all = gathered.whole_masks(call, masks, bits)
    for hop, units in _arrivals(call, x, hops, flying):
        if merged is not None:
            remote.attend(call, hop.owners, x.q, units, bits_of_all, merged)
        if call.keeps_rows():
            kept = units.flatten()
    # 4. A masked query sees nothing, whatever arrived for it.
    if merged is not None and masks.key_padding is not None:
        merged.hide(~masks.key_padding)
    return _rounded(local, merged, x.q.dtype), kept


def backward(call: RingCall, grad: OutputGradient, x: QKV, saved: AttentionOutput, kept: Tensor, masks: Masks) -> QKV:
    """Gradients of this rank's q, k and v; `saved` and `kept` are what the forward returned."""
    if call.mode == "gather":
        return gathered.backward(call, grad, x, saved, kept, masks)
    # 1. Rows and mask bits leave again, unless the forward kept what arrived.
    hops, is_kept = call.hops(), call.keeps_rows()
    flying = _fetch(call, x, hops[0]) if hops and not is_kept else None
    bits = gathered.start_masks(call, masks) if hops else None
    # 2. Local gradients while they fly. Rows that were kept need no waiting: they come first, so that it is their
    # gradients that fly while local ones are computed.
    total = None if is_kept else _local_backward(call, grad, x, saved, masks)
    bits_of_all = gathered.whole_masks(call, masks, bits)
    # 3. Gradients of remote rows, hop after hop, each sent home as soon as it is there.
    # exp(s - inf) = 0: a query that sees no key gives and gets no gradient.
    seen = saved._replace(lse=saved.lse.masked_fill(torch.isneginf(saved.lse), torch.inf))
    of_queries: list[remote.QueryGradient] = []
    homeward: list[tuple[Hop, Pending]] = []
    # Rows are kept in mode "sparse" alone, whose only hop has them all.
    as_kept = ((hop, kept.view(sum(hop.received), x.k.shape[0], 2, x.k.shape[3])) for hop in hops)
    for hop, units in as_kept if is_kept else _arrivals(call, x, hops, flying):
        grads, more = remote.differentiate(call, hop.owners, grad, x.q, units, seen, bits_of_all)
        of_queries += more
        homeward.append((hop, _send_home(call, grads, hop)))
        # Bounds the memory of a ring: one hop's gradients fly at a time.
        if len(homeward) > 1:
            assert total is not None
            _add_home(call, total, *homeward.pop(0))
    if total is None:
        total = _local_backward(call, grad, x, saved, masks)
    # 4. What the others computed for this rank's keys comes home; what they add to the queries never left.
    for hop, coming in homeward:
        _add_home(call, total, hop, coming)
    remote.add_queries(total.q, x.k.shape[2], of_queries)
    return total


def _local_backward(call: RingCall, grad: OutputGradient, x: QKV, saved: AttentionOutput, masks: Masks) -> QKV:
    """Gradients of the local part; those that remote parts are added to in fp32 (fp64), contiguous."""
    dq, dk, dv = call.backend.backward(grad, x, saved, call.problem, _at_own_place(call, masks))
    exact = accumulator(x.q.dtype)
    # Half precision would lose digits with every part that is added.
    if call.plan.receives:
        dq = dq.to(exact).contiguous()
    if call.plan.gives:
        dk, dv = dk.to(exact).contiguous(), dv.to(exact).contiguous()
    return QKV(dq, dk, dv)


def _arrivals(call: RingCall, x: QKV, hops: list[Hop], flying: Pending | None) -> Iterator[tuple[Hop, Tensor]]:
    """The units `(U, B, 2, D)` of each hop, the first of which is flying; the next hop's rows fly meanwhile."""
    for hop, following in itertools.zip_longest(hops, hops[1:]):
        assert flying is not None
        arrived, units = flying, flying.wait()
        flying = None if following is None else _fetch(call, x, following)
        yield hop, units
        arrived.release()


def _fetch(call: RingCall, x: QKV, hop: Hop) -> Pending:
    """Starts to send what the receivers need and to receive what the owners hold."""
    index = call.plan.leaving_index
    rows, heads = (torch.cat([index[p][i] for p in hop.receivers]) for i in (0, 1))
    # (U, B, 2, D)
    packed = remote.pack(x.k, x.v, (rows, heads))
    return call.channel.exchange(packed, hop.sent, hop.received, "rows", call.keeps_rows())


def _send_home(call: RingCall, grads: Handle, hop: Hop) -> Pending:
    """The same exchange backwards: what came from an owner goes to it."""
    if grads.tensor.dtype != call.wire_dtype:
        with grads as exact:
            grads = buffers.borrow(exact.tensor.shape, call.wire_dtype, exact.tensor.device, "gradients sent")
            grads.tensor.copy_(exact.tensor)
    return call.channel.exchange(grads, hop.received, hop.sent, "gradients")


def _add_home(call: RingCall, total: QKV, hop: Hop, coming: Pending) -> None:
    """Waits for gradients that come home and adds them to this rank's own."""
    grads = coming.wait()
    if call.plan.gives:
        # Peer by peer: no unit is in one peer's part twice, so each sum has a fixed order.
        parts = grads.split([call.plan.leaving[p].count for p in hop.receivers])
        for peer, part in zip(hop.receivers, parts, strict=True):
            remote.add_home(total.k, total.v, call.plan.leaving_index[peer], part)
    coming.release()


def _accumulate(call: RingCall, part: AttentionOutput, *, receives: bool) -> LSEAccumulator | None:
    """What other keys are merged into, zero keys first; None where none come on top of the part's."""
    if not receives and not call.zero_keys:
        return None
    num_kv_heads, (out, lse) = call.plan.pattern.num_heads, part
    merged = LSEAccumulator(part, num_kv_heads)
    if call.zero_keys:
        # (H, n)
        counts = call.plan.num_zero_keys.repeat_interleave(out.shape[2] // num_kv_heads, 0)
        # Values of 0 and logits of 0: m of them are a partial with out 0 and lse log(m).
        log_counts = counts.to(accumulator(lse.dtype)).log()
        merged.add(AttentionOutput(out.new_zeros(()).expand_as(out), log_counts.expand_as(lse)))
    return merged


def _rounded(part: AttentionOutput, merged: LSEAccumulator | None, dtype: torch.dtype) -> AttentionOutput:
    """The result in the query's dtype, rounded once: the accumulator's, or the part itself where it is all."""
    return AttentionOutput(part.out.to(dtype), part.lse) if merged is None else merged.result(dtype)


def _at_own_place(call: RingCall, masks: Masks) -> Masks:
    """This rank's bits at their place in a mask of the whole sequence, of which a partial call reads no more."""
    if masks.key_padding is None:
        return masks
    start, stop = call.plan.shard
    return masks._replace(key_padding=torch.nn.functional.pad(masks.key_padding, (start, call.plan.seq_len - stop)))
