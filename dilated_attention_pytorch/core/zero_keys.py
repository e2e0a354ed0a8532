"""The arithmetic of `padding="zero_keys"`: what the official code, and so every published checkpoint, computes.

With g = min(w, N) and m = ceil(g / r), the official code (microsoft/torchscale, `dilated_attention.py`) fills each
segment up to m slots of every offset with rows of zeros. As keys they have logit 0 and value 0: a segment with n real
members adds m - n to its softmax denominator. As queries they are dropped again, except where r does not divide g and
there is more than one segment: then slot (s, j) is written to `s * m * r + j * r + o` although it was read from
`s * g + j * r + o`, so that outputs move, and a filled-up row (a zero query, whose logits are all 0) can land below N.
The official code takes a log-sum-exp of exactly 0 for "not kept"; a lone zero key has just that, and is left out here
too. Checked against the official code itself: equal to rounding, forward and gradients, for every (w, r, N) tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.members import ceil_div
from dilated_attention_pytorch.core.pattern import DilatedPattern


class Segment(NamedTuple):
    """Consecutive official segments that look alike, for one offset.

    Attributes:
        first_segment: index of the first of them.
        num_segments: how many.
        keys: real keys in slots `[0, keys)`.
        queries: real queries in slots `[0, queries)` whose output is kept.
        zero_query: slot of the filled-up query whose output is kept, or -1.
        num_zero_keys: m - keys.
    """

    first_segment: int
    num_segments: int
    keys: int
    queries: int
    zero_query: int
    num_zero_keys: int


def strides(length: int, rate: int, seq_len: int) -> tuple[int, int]:
    """How far apart segments are read and written: g and m * r."""
    g = min(length, seq_len)
    return g, ceil_div(g, rate) * rate


@lru_cache(maxsize=4096)
def segments(length: int, rate: int, offset: int, seq_len: int) -> tuple[Segment, ...]:
    """The official segments of one branch and offset over a sequence, alike neighbours joined."""

    def each() -> Iterator[Segment]:
        g, written = strides(length, rate, seq_len)
        slots = written // rate
        for s in range(ceil_div(seq_len, g)):
            real = min(g, seq_len - s * g)
            keys = max(0, ceil_div(real - offset, rate))
            kept = min(slots, max(0, ceil_div(seq_len - s * written - offset, rate)))
            alone = slots == 1 and keys == 0
            yield Segment(s, 1, keys, min(keys, kept), keys if kept > keys else -1, 0 if alone else slots - keys)

    joined: list[Segment] = []
    for segment in each():
        if joined and joined[-1][2:] == segment[2:]:
            joined[-1] = joined[-1]._replace(num_segments=joined[-1].num_segments + 1)
        else:
            joined.append(segment)
    return tuple(joined)


def keys_of(
    pattern: DilatedPattern, branch: int, position: int, head: int, seq_len: int
) -> tuple[int, range, int] | None:
    """What one output position sees in one branch: `visibility` for a single query.

    Args:
        pattern: the pattern.
        branch: branch index.
        position: where the output is written, in `[0, seq_len)`.
        head: key/value head.
        seq_len: N.

    Returns:
        The position its query is read from (-1 for a zero query), its keys, and the number of its zero keys; None where
        the branch writes nothing.
    """
    length, rate = pattern.branches[branch]
    g, written = strides(length, rate, seq_len)
    offset = pattern.offset(branch, head)
    segment, within = divmod(position, written)
    if within % rate != offset:
        return None
    start, stop = segment * g, min(segment * g + g, seq_len)
    keys, slots = range(start + offset, stop, rate), written // rate
    source = start + within
    alone = slots == 1 and len(keys) == 0
    return (source if within < g and source < seq_len else -1), keys, (0 if alone else slots - len(keys))


def visibility(
    pattern: DilatedPattern, branch: int, q_pos: Tensor, k_pos: Tensor, seq_len: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense form for the reference: seen keys, source positions of the query rows, number of zero keys.

    Args:
        pattern: the pattern.
        branch: branch index.
        q_pos: int64 `(B, Nq)`, the positions the outputs are written to.
        k_pos: int64 `(B, Nk)`.
        seq_len: int64 `(B, Nq)`, N of each query's sequence.
        group: query heads per key head.

    Returns:
        Bool `(B, H, Nq, Nk)`; int64 `(B, Nq)`, -1 for a zero query; int64 `(B, H, Nq)`.
    """
    length, rate = pattern.branches[branch]
    g = seq_len.clamp_max(length)
    slots = (g + rate - 1) // rate
    segment, within = q_pos // (slots * rate), q_pos % (slots * rate)
    source = segment * g + within
    source = torch.where((within < g) & (source < seq_len), source, -1)

    heads = pattern.num_heads * group
    offsets = torch.tensor([pattern.offset(branch, h // group) for h in range(heads)], device=q_pos.device)
    o = offsets[None, :, None]
    writes = within[:, None] % rate == o  # (B, H, Nq)
    start, stop = segment * g, torch.minimum(segment * g + g, seq_len)
    at = k_pos[:, None, None, :]
    in_segment = (at >= start[:, None, :, None]) & (at < stop[:, None, :, None])
    # Keys lie at start + j * r + o; the residue counts from the segment's start, as the query's does.
    member = (at - start[:, None, :, None]) % rate == o[..., None]
    seen = writes[..., None] & in_segment & member
    real = ((stop - start)[:, None] - o + rate - 1).div(rate, rounding_mode="floor").clamp_min(0)
    alone = (slots[:, None] == 1) & (real == 0)
    pads = torch.where(writes & ~alone, slots[:, None] - real, 0)
    return seen, source, pads


def counts(pattern: DilatedPattern, start: int, stop: int, seq_len: int, device: torch.device | None) -> Tensor:
    """How many zero keys positions `[start, stop)` of a sequence see, all branches together: fp32 `(H_kv, n)`."""
    positions = torch.arange(start, stop, device=device)[None]
    no_keys, lengths = positions[:, :0], torch.full_like(positions, seq_len)
    found = [visibility(pattern, i, positions, no_keys, lengths, 1)[2][0] for i in range(len(pattern.branches))]
    return torch.stack(found).sum(0).to(torch.float32)


def moving_branch(pattern: DilatedPattern, seq_len: int) -> tuple[int, int] | None:
    """The first branch (w, r) whose outputs the official code writes to other positions than it reads queries from."""
    for length, rate in pattern.branches:
        read, written = strides(length, rate, seq_len)
        if read != written and seq_len > read:
            return length, rate
    return None


def read_rows(queries: Tensor, q_pos: Tensor, source: Tensor) -> Tensor:
    """The query rows at the source positions, zeros where there is none.

    Args:
        queries: `(B, Nq, H, D)`; row n holds position `q_pos[:, n]` of a sequence that lies whole in the rows.
        q_pos: int64 `(B, Nq)`.
        source: int64 `(B, Nq)`, -1 for a zero row.
    """
    index = torch.arange(q_pos.shape[1], device=q_pos.device) - q_pos + source
    rows = torch.gather(queries, 1, index.clamp_min(0)[:, :, None, None].expand_as(queries))
    return rows.masked_fill((source < 0)[:, :, None, None], 0.0)
