"""The attention op written out in plain torch ops, for exporters: `torch.onnx.export` finds it by itself.

A branch takes its members out of the rows, slot by slot, and is a batch of small softmaxes over them; branches are
merged by log-sum-exp as all partials are. Sizes follow from the inputs' sizes and no value is looked at, so one graph
serves all lengths. Per head a branch (w, r) forms N * min(w, N) / r**2 logits, where the reference forms N**2.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.members import ceil_div
from dilated_attention_pytorch.core.merge import merge_attention
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.types import QKV, AttentionOutput, Masks


class Sequences(NamedTuple):
    """The n sequences of a call, rows of a batch or packed ones, when all rows lie one after the other.

    Attributes:
        q_first: int64 `(n,)`, each one's first row among the queries.
        k_first: among the keys.
        start: int64 `(n,)`, how far its position 0 is from where positions are counted: left padding.
        length: int64 `(n,)`, its positions.
    """

    q_first: Tensor
    k_first: Tensor
    start: Tensor
    length: Tensor

    @staticmethod
    def of(x: QKV, problem: Problem, masks: Masks) -> Sequences:
        """The sequences of the whole call."""
        device = x.q.device
        if masks.cu_seqlens is not None:
            bounds = masks.cu_seqlens.to(device, torch.int64)
            # With a segment shift all of them start at it.
            length = bounds.diff() + problem.q_start
            return Sequences(bounds[:-1], bounds[:-1], torch.zeros_like(bounds[:-1]), length)
        row = torch.arange(x.q.shape[0], device=device)
        start = torch.zeros_like(row) if masks.row_start is None else masks.row_start.to(device, torch.int64)
        return Sequences(row * x.q.shape[1], row * x.k.shape[1], start, (problem.seq_len - start).clamp_min(0))


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What the op computes of the same arguments; dropout is refused."""
    x, masks = QKV(*arguments[:3]), Masks(*arguments[3:7])
    problem = Problem.unpack(x.k.shape[2], arguments[7:-1])
    if problem.dropout_p > 0.0:
        raise NotImplementedError(
            f"expected dropout_p=0 for an export, got {problem.dropout_p}: call eval() on the model before"
        )
    branches = range(len(problem.pattern.branches))
    sequences, seen = Sequences.of(x, problem, masks), masks.key_padding
    parts = [_branch(branch, x, problem, sequences, seen, masks.row_start is None) for branch in branches]
    out, lse = reduce(merge_attention, parts)
    # (B * Nq, H, D) and (H, B * Nq)
    return out.view_as(x.q).to(x.q.dtype), lse.unflatten(1, x.q.shape[:2]).transpose(0, 1).contiguous()


def _branch(
    branch: int, x: QKV, problem: Problem, sequences: Sequences, seen: Tensor | None, starts_together: bool
) -> AttentionOutput:
    """One branch over its members: out `(B * Nq, H, D)` and lse `(H, B * Nq)` in the accumulator's dtype."""
    device, dtype, heads = x.q.device, accumulator(x.q.dtype), x.q.shape[2]
    length, rate = problem.pattern.branches[branch]
    group = heads // x.k.shape[2]
    head = torch.arange(heads, device=device)  # (H,)
    kv_head = head // group
    modulo = problem.pattern.offsets == "modulo"
    offset = kv_head % rate if modulo else kv_head // ceil_div(x.k.shape[2], rate)
    filled = problem.padding == "zero_keys"
    read = written = torch.full_like(sequences.length, length)  # (n,), from a segment to the next
    if filled:
        read = sequences.length.clamp(1, length)
        written = (read + rate - 1) // rate * rate

    # Segments of all sequences one after the other: T of them, which only the sizes of the inputs decide.
    skipped = problem.q_start // length if starts_together else 0  # before the first query's
    n = sequences.length.shape[0]
    # Positions of all sequences: packed ones share one row, and each starts at q_start.
    total = x.q.shape[0] * (problem.seq_len - problem.q_start) + n * problem.q_start
    index = torch.arange(n + (total - n) // length - n * skipped, device=device)  # (T,)
    count = (sequences.length + read - 1) // read - skipped
    first = count.cumsum(0) - count
    sequence = (first <= index[:, None]).sum(1) - 1
    begin = (index - first[sequence] + skipped) * read[sequence]
    size = torch.minimum(read[sequence], sequences.length[sequence] - begin)[:, None]  # (T, 1)

    slots = ceil_div(torch.sym_min(length, problem.seq_len), rate)
    within = offset[:, None, None] + rate * torch.arange(slots, device=device)  # (H, 1, slots)
    inside = within < size  # (H, T, slots)
    place = begin[:, None] + within + sequences.start[sequence][:, None]
    q_row = place - problem.q_start + sequences.q_first[sequence][:, None]
    k_row = place - problem.k_start + sequences.k_first[sequence][:, None]
    k_least = sequences.k_first[sequence][:, None]
    shown = inside & (k_row >= k_least) & (k_row < k_least + x.k.shape[1])
    q = _taken(x.q, q_row, head).to(dtype)  # (H, T, slots, D)
    k, v = (_taken(y, k_row, kv_head).to(dtype) for y in (x.k, x.v))
    if filled:  # a slot beyond its segment is a query of zeros
        q = q.masked_fill(~inside[..., None], 0.0)
    if seen is not None:
        k_seen = seen[:, problem.k_start : problem.k_start + x.k.shape[1]].flatten()
        shown = shown & k_seen[k_row.clamp(0, k_seen.shape[0] - 1)]

    hidden = ~shown[:, :, None, :]
    if problem.is_causal:
        slot = torch.arange(slots, device=device)
        hidden = hidden | (slot > slot[:, None])
    logits = (q @ k.transpose(-1, -2) * problem.scale).masked_fill(hidden, -torch.inf)  # (H, T, slots, slots)
    top = logits.amax(-1)
    pads = None
    if filled:
        members = ((size[:, 0] - offset[:, None] + rate - 1) // rate).clamp_min(0)  # (H, T)
        whole = (written // rate)[sequence]
        pads = torch.where((whole == 1) & (members == 0), 0, whole - members)[..., None].to(dtype)
        top = torch.where(pads > 0, top.clamp_min(0.0), top)
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = (logits - top[..., None]).exp()
    z = p.sum(-1) if pads is None else p.sum(-1) + pads * (-top).exp()  # (H, T, slots)
    empty = z == 0
    z = z.masked_fill(empty, 1.0)
    lse = (z.log() + top).masked_fill(empty, -torch.inf)
    out = p @ v / z[..., None]

    # Back to rows: each finds its slot, if it is a member.
    row = torch.arange(x.q.shape[0] * x.q.shape[1], device=device)  # (B * Nq,)
    sequence = (sequences.q_first <= row[:, None]).sum(1) - 1
    position = row - sequences.q_first[sequence] + problem.q_start - sequences.start[sequence]
    stride, within = written[sequence], position.clamp_min(0)
    segment, residue = first[sequence] + within // stride - skipped, within % stride
    member = (residue % rate == offset[:, None]) & (position >= 0)  # (H, B * Nq)
    if seen is not None:
        member = member & seen[:, problem.q_start : problem.q_start + x.q.shape[1]].flatten()
    at = head[:, None], segment, residue // rate
    lse = lse[at].masked_fill(~member, -torch.inf)
    return AttentionOutput(out[at].masked_fill(~member[..., None], 0.0).transpose(0, 1), lse)


def _taken(x: Tensor, row: Tensor, head: Tensor) -> Tensor:
    """Rows `(H, T, slots)` of x `(B, N, heads, D)`, whose rows lie one after the other; any row outside."""
    return x.flatten(0, 1)[row.clamp(0, x.shape[0] * x.shape[1] - 1), head[:, None, None]]
