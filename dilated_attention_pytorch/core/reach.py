"""Reach: how far information travels through layers of dilated attention (docs/spec.md, 2).

After L layers position n depends on the positions that L steps of "m is a key of n" connect it to. A layer passes on
its own position (the residual), and what follows attention mixes heads, so each head of a layer sees what any head
brought before. The earliest position that n depends on is therefore a minimum over its keys of theirs, layer by layer:
one pass over each branch's members per layer, exact for every position.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.members import Members, ceil_div
from dilated_attention_pytorch.core.shift import check_room

MOST_POSITIONS = 1 << 27  # that are gone through one by one: half a GB per table, a minute or two


class Reach(NamedTuple):
    """How far away the farthest input stands that can change an output, over all positions of a sequence.

    Attributes:
        worst: positions from the output to its farthest input, where the most is out of reach; the least of those.
        median: of all positions.
        best: of all positions. Below `seq_len - 1` no position knows the whole sequence.
        out_of_reach: positions before the earliest input and, without causality, behind the latest one, where they are
            most. 0 if everything reaches every position that may see it.
        keys_at_start: keys per head, over all branches, of the position that has the fewest among those where a segment
            starts. None if no segment starts behind position 0.
    """

    worst: int
    median: int
    best: int
    out_of_reach: int
    keys_at_start: float | None


def ends(
    branches: Sequence[Sequence[Members]], shifts: Sequence[int], seq_len: int, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The earliest and the latest input that can change the output of each position, int64 `(N,)` each.

    Args:
        branches: of each branch what its heads keep, one entry per offset.
        shifts: segment shift of each layer, the first layer first.
        seq_len: N.
        is_causal: whether queries see no later keys.
    """
    first = torch.arange(seq_len, device="cpu")
    last = first.clone()
    kept = [members for branch in branches for members in branch if members.slots]
    idle: set[int] = set()
    for shift in shifts:
        before = first, last
        first, last = first.clone(), last.clone()
        for members in kept:
            _step(first, before[0], members, shift, is_causal, 1)
            if not is_causal:
                _step(last, before[1], members, shift, is_causal, -1)
        # When one layer of each kind has changed nothing, no further layer does.
        same = torch.equal(first, before[0]) and torch.equal(last, before[1])
        idle = idle | {shift} if same else set()
        if idle == set(shifts):
            break
    return first, last


def _step(found: Tensor, known: Tensor, members: Members, shift: int, is_causal: bool, sign: int) -> None:
    """Lowers (sign 1) or raises (-1) `found` at a branch's members to the extreme of what their keys know."""
    count = len(found)
    start, stop = members.before(shift), members.before(shift + count)
    if start == stop:
        return
    rows = members.rows(shift, count, found.device)
    # Members side by side, whole segments: (segments, slots). A segment beyond all members is as long as they are many.
    slots = members.slots if start // members.slots != (stop - 1) // members.slots else stop - start
    front = start % members.slots if slots == members.slots else 0
    length = ceil_div(front + stop - start, slots) * slots
    padded = known.new_full((length,), count)
    padded[front : front + stop - start] = sign * known[rows]
    table = padded.view(-1, slots)
    best = table.cummin(1).values if is_causal else table.amin(1, keepdim=True).expand_as(table)
    seen = sign * best.reshape(-1)[front : front + stop - start]
    found[rows] = torch.minimum(found[rows], seen) if sign > 0 else torch.maximum(found[rows], seen)


def keys_at_starts(
    branches: Sequence[Sequence[tuple[Members, int]]], shift: int, seq_len: int, spans: Sequence[range], *,
    is_causal: bool,
) -> float | None:  # fmt: skip
    """The fewest keys per head, over all branches, of the positions behind 0 at which a segment starts.

    Args:
        branches: of each branch what its heads keep, and how many heads that is.
        shift: segment shift.
        seq_len: N.
        spans: the positions that are looked at.
        is_causal: whether queries see no later keys.
    """
    end = shift + seq_len  # positions are counted as segments are, from the shift on
    found = []
    for length, span in itertools.product({branch[0][0].length for branch in branches}, spans):
        first = ceil_div(max(span.start, 1) + shift, length) * length
        if first < shift + span.stop:
            found.append(torch.arange(first, shift + span.stop, length, device="cpu"))
    if not found:
        return None
    at = torch.cat(found).unique()
    total = torch.zeros_like(at)
    for members, heads in (x for branch in branches for x in branch):
        begin = at // members.length * members.length
        stop = at + 1 if is_causal else begin + (end - begin).clamp(max=members.length)
        # Members of the segment up to a position: ceil((position - begin - o) / r), from the first real position on.
        upto = [(-((begin + members.offset - x) // members.rate)).clamp(min=0) for x in (begin.clamp(min=shift), stop)]
        total += torch.where(members.of(at), upto[1] - upto[0], 0) * heads
    return int(total.min()) / sum(heads for _, heads in branches[0])


def find(
    branches: Sequence[Sequence[tuple[Members, int]]], shifts: Sequence[int], seq_len: int, *, is_causal: bool
) -> Reach:
    """The `Reach` of layers with these shifts; arguments as in `ends` and `keys_at_starts`."""
    lengths = [branch[0][0].length for branch in branches]
    kept = [[members for members, _ in branch] for branch in branches]
    # Where all branches start a segment together the pattern starts anew. Without a shift nothing crosses that border.
    period = math.lcm(*lengths)
    size = seq_len if any(shifts) else min(period, seq_len)
    check_room(shifts, seq_len)
    if size > MOST_POSITIONS:
        raise ValueError(
            f"expected seq_len of at most {MOST_POSITIONS:,}, or unshifted segments whose least common multiple is, "
            f"got {seq_len:,}: every position up to there is looked at"
        )
    whole, rest = divmod(seq_len, max(1, size))
    distances, weights, missing = [], [], []
    for length, copies in ((size, whole), (rest, 1)):
        if length == 0 or copies == 0:
            continue
        first, last = ends(kept, shifts, length, is_causal=is_causal)
        own = torch.arange(length, device="cpu")
        distances.append(torch.maximum(own - first, last - own))
        weights.append(torch.full((length,), copies, device="cpu"))
        # The last copy has the most before it; without causality all have the same around them.
        begin = (copies - 1) * size if length == size else whole * size
        missing.append(begin + first if is_causal else seq_len - 1 - last + first)
    if not distances:
        return Reach(0, 0, 0, 0, None)
    distance, out_of_reach = torch.cat(distances), torch.cat(missing)
    order = distance.sort()
    counted = torch.cat(weights)[order.indices].cumsum(0)
    median = order.values[torch.searchsorted(counted, (seq_len + 1) // 2)]
    most = out_of_reach.max()
    # The first two periods have all kinds of starts, the last one those whose segments the end cuts.
    spans = [range(min(seq_len, 2 * size)), range(max(0, seq_len - 2 * size), seq_len)]
    keys = [keys_at_starts(branches, shift, seq_len, spans, is_causal=is_causal) for shift in set(shifts)]
    fewest = min((x for x in keys if x is not None), default=None)
    return Reach(int(distance[out_of_reach == most].min()), int(median), int(distance.max()), int(most), fewest)
