"""The executable specification: dense softmax over the multiset union of all branches' keys (docs/spec.md, 3).

Every branch contributes its own copy of the logits, masked to what the branch shows, and one softmax runs over all of
them. It takes O(branches * N^2) memory, any device, any float dtype, and is plain differentiable torch (second
derivatives and `torch.func` included). All other backends are held to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.core import dropout, zero_keys
from dilated_attention_pytorch.core.precision import accumulator, without_autocast
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.types import AttentionOutput


@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    *,
    key_padding_mask: Tensor | None = None,
    row_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
) -> AttentionOutput:
    """Dilated attention by definition.

    Args:
        q: `(B, Nq, H, D)`, positions `[q_start, q_start + Nq)`.
        k: `(B, Nk, H_kv, D)`, positions `[k_start, k_start + Nk)`.
        v: like k.
        problem: everything that is not data.
        key_padding_mask: bool `(B, seq_len)`, True = real.
        row_start: int `(B,)`, first real position of each row.
        cu_seqlens: int `(sequences + 1,)`, bounds of the sequences packed along N (B = 1).
        seed: int64 scalar; needed with dropout.

    Returns:
        `out` `(B, Nq, H, D)` and `lse` `(B, H, Nq)`.
    """
    dtype = accumulator(q.dtype)
    group = q.shape[2] // k.shape[2]
    queries = q.to(dtype)
    keys = k.to(dtype).repeat_interleave(group, dim=2)
    values = v.to(dtype).repeat_interleave(group, dim=2)

    q_pos, q_seq = _positions(q, problem.q_start, row_start, cu_seqlens)
    k_pos, k_seq = _positions(k, problem.k_start, row_start, cu_seqlens)
    q_real = k_real = None
    if key_padding_mask is not None:
        q_real = key_padding_mask[:, problem.q_start : problem.q_start + q.shape[1]]
        k_real = key_padding_mask[:, problem.k_start : problem.k_start + k.shape[1]]
    seq_len = _sequence_lengths(q_pos, problem.seq_len, cu_seqlens)

    logits, num_zero_keys, keeps = [], [], []
    for branch in range(len(problem.pattern.branches)):
        seen, source, pads = _visibility(problem, branch, q_pos, k_pos, seq_len, group)
        seen = seen & (q_seq[:, None, :, None] == k_seq[:, None, None, :])
        if problem.is_causal:
            seen = seen & (k_pos[:, None, None, :] <= q_pos[:, None, :, None])
        if q_real is not None and k_real is not None:
            seen = seen & q_real[:, None, :, None] & k_real[:, None, None, :]
        rows = queries if source is None else zero_keys.read_rows(queries, q_pos, source)
        s = torch.einsum("bnhd,bmhd->bhnm", rows, keys) * problem.scale
        logits.append(s.masked_fill(~seen, -torch.inf))
        if pads is not None:
            num_zero_keys.append(pads)
        if problem.dropout_p > 0.0:
            assert seed is not None
            keeps.append(_keep(problem, branch, seed, q_pos, k_pos, q_seq, q.shape[2]))

    stacked = torch.stack(logits)  # (branches, B, H, Nq, Nk)
    zeros = torch.stack(num_zero_keys) if num_zero_keys else None  # (branches, B, H, Nq)
    # A zero key has logit 0, so it takes part in the maximum and in the sum, and carries no value.
    top = stacked.amax((0, -1)) if stacked.shape[-1] else stacked.new_full(stacked.shape[1:-1], -torch.inf)
    if zeros is not None:
        top = torch.where(zeros.sum(0) > 0, top.clamp_min(0.0), top)
    top = top.detach().masked_fill(torch.isneginf(top), 0.0)
    p = (stacked - top[None, ..., None]).exp()
    branch_sum = p.sum(-1)
    if zeros is not None:
        branch_sum = branch_sum + zeros * (-top).exp()
    total = branch_sum.sum(0)
    empty = total == 0
    safe_total = total.masked_fill(empty, 1.0)
    lse = (safe_total.log() + top).masked_fill(empty, -torch.inf)

    if keeps:
        p = p * torch.stack(keeps).to(dtype) / (1.0 - problem.dropout_p)
    if problem.mixing_gradient == "detached":
        # The branch weights are constants to the gradient; inside each branch the softmax is differentiated.
        weight = (branch_sum / safe_total).detach()
        safe_branch = branch_sum.masked_fill(branch_sum == 0, 1.0)
        p = p / safe_branch[..., None] * weight[..., None]
    else:
        p = p / safe_total[..., None]
    out = torch.einsum("ibhnm,bmhd->bnhd", p, values)
    return AttentionOutput(out.to(q.dtype), lse)


def _positions(x: Tensor, start: int, row_start: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Position in its sequence, and number of the sequence, of every row of x: two int64 `(B, N)`."""
    index = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(x.device, torch.int64)
        sequence = torch.searchsorted(bounds, index, right=True) - 1
        # Packed, each sequence starts at the same position: 0, or a segment shift.
        return (start + index - bounds[sequence])[None], sequence[None]
    index = start + index
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    if row_start is not None:
        index = index - row_start.to(x.device, torch.int64)[:, None]
    return index.expand(x.shape[0], -1), batch.expand(-1, x.shape[1])


def _sequence_lengths(q_pos: Tensor, seq_len: int, cu_seqlens: Tensor | None) -> Tensor:
    """The length of the sequence that each query belongs to, `(B, Nq)`."""
    if cu_seqlens is None:
        return torch.full_like(q_pos, seq_len)
    lengths = cu_seqlens.diff().to(q_pos.device, torch.int64)
    return lengths.repeat_interleave(lengths, output_size=q_pos.shape[1])[None]


def _visibility(
    problem: Problem, branch: int, q_pos: Tensor, k_pos: Tensor, seq_len: Tensor, group: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Which keys the branch shows to each query `(B, H, Nq, Nk)`, which position each query row is read from, and how
    many zero keys it sees `(B, H, Nq)`; the last two only with `padding="zero_keys"`."""
    if problem.padding == "zero_keys":
        return zero_keys.visibility(problem.pattern, branch, q_pos, k_pos, seq_len, group)
    length = problem.pattern.segment_lengths[branch]
    q_in = problem.pattern.membership(q_pos)[branch].repeat_interleave(group, 0).transpose(0, 1)
    k_in = problem.pattern.membership(k_pos)[branch].repeat_interleave(group, 0).transpose(0, 1)
    same_segment = (q_pos // length)[:, None, :, None] == (k_pos // length)[:, None, None, :]
    return q_in[..., None] & k_in[:, :, None, :] & same_segment, None, None


def _keep(
    problem: Problem, branch: int, seed: Tensor, q_pos: Tensor, k_pos: Tensor, q_seq: Tensor, num_heads: int
) -> Tensor:
    heads = torch.arange(num_heads, device=q_pos.device)[:, None]
    rows = dropout.row_state(seed.to(q_pos.device), q_seq[:, None], heads, q_pos[:, None])  # (B, H, Nq)
    state = dropout.absorb(rows, branch)
    return dropout.keep_mask(state[..., None], k_pos[:, None, None, :], problem.dropout_p)
