"""Plans ranges: how long they are, which branches they cut, and how many bytes of the device that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dilated_attention_pytorch.core.members import Members, ceil_div
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import Problem

BUFFERS = 2  # of each kind: one is filled while the other is used
_RANGES = 32  # per sequence: the first range's copy and the last one's are not overlapped, a 32nd of the time each
_WORTHWHILE = 64 << 20  # bytes of a range below which launches cost more than they overlap
_ENOUGH = 1 << 30  # and above which nothing more is gained
_EAGER_TILES = 6 << 23  # elements that sdpa's eager tiles hold at a time beside the inputs


@dataclass(frozen=True)
class Sizes:
    """What a pass costs per row of the sequence.

    Attributes:
        batch: B.
        num_heads: H.
        num_kv_heads: H_kv.
        head_dim: D.
        dtype: of q, k, v.
        is_masked: there is a key_padding_mask.
        is_backward: which pass.
        is_fused: the Triton kernels compute it.
        device_type: "cpu" or "cuda".
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    is_masked: bool
    is_backward: bool
    is_fused: bool
    device_type: str

    @property
    def accumulator(self) -> int:
        """Bytes of an element of an accumulator."""
        return accumulator(self.dtype).itemsize

    def inputs(self, share: float = 1.0) -> int:
        """Bytes per row that are brought in, for a share of the heads."""
        queries = 3 if self.is_backward else 1
        values = (queries * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.dtype.itemsize
        lse = self.num_heads * self.accumulator if self.is_backward else 0
        return math.ceil(self.batch * ((values + lse) * share + self.is_masked))

    def results(self, element: int, share: float = 1.0) -> int:
        """Bytes per row of what a pass computes, values in elements of so many bytes."""
        rows = self.num_heads + 2 * self.num_kv_heads if self.is_backward else self.num_heads
        lse = 0 if self.is_backward else self.num_heads * self.accumulator
        return math.ceil(self.batch * (rows * self.head_dim * element + lse) * share)

    def work(self, share: float = 1.0) -> int:
        """Bytes per row that an attention call holds beside its inputs, its results among them."""
        if self.is_fused:
            # dO . out, the two terms that dK/dV reads, and a copy of lse head by head; fp32 each.
            terms = 4 * 4 * self.num_heads if self.is_backward else 0
            return self.results(self.dtype.itemsize, share) + math.ceil(self.batch * terms * share)
        # Accumulators; copies of the inputs in the dtype that is computed in; a piece's own result; what merges it.
        copies = self.inputs(share) // self.dtype.itemsize * max(4, self.dtype.itemsize)
        return 3 * self.results(self.accumulator, share) + copies


# A branch (w, r) over the sequence is a branch (slots, 1) over its compact rows: those of one offset, put side by side
# (`core.members`). A segment that is too long for a range is therefore attention over few rows that lie densely,
# computed once.
@dataclass(frozen=True, eq=False)
class CompactBranch:
    """What the heads of one offset keep in one branch."""

    pattern: DilatedPattern  # for the key/value heads
    branch: int  # its number
    members: Members
    heads: slice  # the key/value heads that keep them
    seq_len: int
    shift: int = 0  # segment shift: row n of the sequence stands at position n + shift of the pattern

    @property
    def num_heads(self) -> int:
        """How many key/value heads share the rows."""
        return len(range(*self.heads.indices(self.pattern.num_heads)))

    def count(self, start: int, stop: int) -> int:
        """How many rows lie in `[start, stop)`, as far as the sequence goes."""
        start, stop = min(start, self.seq_len), min(stop, self.seq_len)
        return max(0, self.members.before(stop + self.shift) - self.members.before(start + self.shift))

    def beginning_in(self, start: int, stop: int) -> tuple[int, int]:
        """The positions `[first, last)` of the segments that begin in `[start, stop)`; empty if none does.

        The first range has the segment that a shift cuts, too.
        """
        length, shift = self.members.length, self.shift
        first, last = (ceil_div(position + shift, length) * length - shift for position in (start, stop))
        first = first if start > 0 else 0
        return first, max(first, min(last, self.seq_len))

    def segment_start(self, position: int) -> int:
        """Where the segment of a position begins."""
        return (position + self.shift) // self.members.length * self.members.length - self.shift

    def problem(self, whole: Problem, first: int, rows: int) -> Problem:
        """Attention of so many compact rows from a position on, at which a segment or the sequence begins."""
        pattern = DilatedPattern((self.members.slots,), (1,), self.num_heads)
        slot = self.members.before(first + self.shift) % self.members.slots
        return Problem(pattern, whole.is_causal, whole.scale, 0.0, slot, slot, slot + rows)

    def pairs(
        self, x: Tensor, x_start: int, compact: Tensor, compact_start: int, start: int, stop: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the rows in `[start, stop)`, where they lie in the sequence and where they lie side by side."""
        # At most three pairs (B, segments, slots, ...), none of them empty. x (B, n, H, ...) or (B, n) has the
        # positions from x_start on, compact (B, L, h, G, ...) or (B, L) the rows from compact_start on.
        if x.dim() > 2:  # (B, n, H, ...) -> (B, n, h, G, ...), a view
            x = x.unflatten(2, (self.pattern.num_heads, -1))[:, :, self.heads]
        (length, rate, offset), row = self.members, x.stride(1)
        at = self.count(compact_start, start)  # row of compact
        span_of = start + self.shift, stop + self.shift
        for span in self.pattern.spans(self.branch, offset, span_of, span_of):
            segments, slots = span.num_segments, span.q_hi - span.q_lo
            if slots == 0:
                continue
            # Slot j of segment s lies at s * w + o + j * r.
            first = span.first_segment * length + offset + span.q_lo * rate - self.shift - x_start
            # One segment (slot) has no stride to the next, and w (r) may be near 2**63.
            strides = length * row if segments > 1 else 0, rate * row if slots > 1 else 0
            view = x.as_strided(
                (x.shape[0], segments, slots, *x.shape[2:]),
                (x.stride(0), *strides, *x.stride()[2:]),
                x.storage_offset() + first * row,
            )
            yield view, compact[:, at : at + segments * slots].unflatten(1, (segments, slots))
            at += segments * slots

    def gather(self, x: Tensor, x_start: int, start: int, stop: int, out: Tensor) -> None:
        """Copies the rows in `[start, stop)` of x into `out` `(B, L, h, G, ...)`, side by side."""
        for rows, beside in self.pairs(x, x_start, out, start, start, stop):
            beside.copy_(rows)

    def shape(self, shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
        """The shape of so many compact rows of a tensor `(B, n, H, ...)` or `(B, n)`."""
        if len(shape) == 2:
            return shape[0], rows
        return shape[0], rows, self.num_heads, shape[2] // self.pattern.num_heads, *shape[3:]


def compact_branches(pattern: DilatedPattern, branch: int, seq_len: int, shift: int = 0) -> list[CompactBranch]:
    """One per offset that the heads of a branch keep; offsets of which no position exists are left out."""
    groups = [(pattern.members(branch, offset), heads) for offset, heads in pattern.head_groups(branch)]
    return [CompactBranch(pattern, branch, *group, seq_len, shift) for group in groups if group[0].slots]


@dataclass(frozen=True)
class RangePlan:
    """A pass over the sequence in ranges of equal length, the last one shorter, and the first one with a shift.

    Attributes:
        problem: the settings of the whole sequence; `q_start` is the segment shift.
        sizes: what a row costs.
        length: positions of a range.
    """

    problem: Problem
    sizes: Sizes
    length: int

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """`[start, stop)` of each range."""
        n, length = self.problem.seq_len, self.length
        first = -self.inside(0) if length < n else 0
        return [(max(0, start), min(start + length, n)) for start in range(first, n, length)]

    def inside(self, start: int) -> int:
        """Where a range begins in the sequence of `aligned`: at 0, but for the first one with a segment shift."""
        position = self.problem.q_start + start
        return position if self.length >= self.problem.seq_len else position % self.length

    @cached_property
    def aligned(self) -> Problem | None:
        """The branches whose segments no range cuts, as the problem of a sequence that starts anew with each range."""
        pattern = self.problem.pattern
        kept = [branch for branch in pattern.branches if self._is_aligned(branch[0])]
        if not kept:
            return None
        lengths, rates = zip(*kept, strict=True)
        part = DilatedPattern(lengths, rates, pattern.num_heads, pattern.offsets)
        return Problem(part, self.problem.is_causal, self.problem.scale, seq_len=self.length)

    @cached_property
    def compact(self) -> tuple[CompactBranch, ...]:
        """The other branches, as rows side by side."""
        pattern = self.problem.pattern
        cut = [i for i, w in enumerate(pattern.segment_lengths) if not self._is_aligned(w)]
        n, shift = self.problem.seq_len, self.problem.q_start
        return tuple(x for i in cut for x in compact_branches(pattern, i, n, shift))

    @cached_property
    def device_bytes(self) -> int:
        """Most bytes that the pass holds on the device; on a CPU, beside what the caller holds."""
        sizes, rows = self.sizes, min(self.length, self.problem.seq_len)
        # Each range's own rows, and per branch that is cut the rows ahead of it and the results that are carried.
        buffered = rows * sizes.inputs()
        carried = compacting = 0
        for branch in self.compact:
            share = branch.num_heads / sizes.num_kv_heads
            total, slots = branch.count(0, self.problem.seq_len), branch.members.slots
            # Rows ahead of a range, and those of the segments that begin in one.
            tail = min(slots, total)
            # A shift cuts one segment more.
            fresh = min((rows // branch.members.length + (2 if branch.shift else 1)) * slots, total)
            buffered += tail * sizes.inputs(share)
            carried += (tail + fresh) * sizes.results(sizes.accumulator, share)
            compacting = max(compacting, fresh * (sizes.inputs(share) + sizes.work(share)))
        # Merging takes the results to fp32 and a copy of some; one range's leave while the next one's are computed.
        merging = rows * 2 * sizes.results(sizes.accumulator) if self.compact else 0
        leaving = 2 * rows * sizes.results(sizes.dtype.itemsize)
        computing = max(rows * sizes.work() + merging, compacting)
        return BUFFERS * buffered + leaving + carried + computing + self._constant()

    def _constant(self) -> int:
        """Bytes that do not grow with the range."""
        sizes = self.sizes
        fixed = 1 << 16  # room between tensors in a buffer
        if sizes.is_fused and sizes.is_backward:
            # Two fp32 terms per row and head; each residue's rows are padded to a tile of 128.
            longest = max(self.problem.pattern.dilation_rates)
            fixed += 2 * 4 * sizes.batch * sizes.num_heads * 128 * longest
        if sizes.device_type == "cuda" and not sizes.is_fused:
            fixed += _EAGER_TILES * sizes.accumulator
        return fixed

    def _is_aligned(self, segment_length: int) -> bool:
        return self.length >= self.problem.seq_len or self.length % segment_length == 0


def plan_ranges(problem: Problem, sizes: Sizes, limit: int, length: int | None = None) -> RangePlan:
    """Chooses the longest useful ranges within a limit.

    A branch costs no byte beside the range itself if the range is a whole number of its segments; of any other branch 1
    row in r is brought in as well. So lengths are multiples of segments, the densest branches first, unless that leaves
    too few ranges to overlap copies with computing.

    Args:
        problem: the settings of the whole sequence.
        sizes: what a row costs.
        limit: bytes of the device.
        length: positions of a range, if the caller decides.

    Raises:
        ValueError: even the shortest range, or the one asked for, takes more than the limit.
    """
    n = max(1, problem.seq_len)

    def cost(length: int) -> int:
        return RangePlan(problem, sizes, min(length, n)).device_bytes

    if length is None:
        length = _chosen(problem, cost, limit, max(1, sizes.inputs()))
    elif cost(length) > limit:
        words = f"bytes for ranges of {min(length, n):,} positions"
        raise ValueError(f"expected device_limit of at least {cost(length):,} {words}, got {limit:,}")
    return RangePlan(problem, sizes, min(length, n))


def _chosen(problem: Problem, cost: Callable[[int], int], limit: int, row: int) -> int:
    """The length of a range whose rows take so many bytes each."""
    n = max(1, problem.seq_len)
    # 1. The shortest length to have multiples of: as many branches as possible are not cut.
    base = 1
    for width, rate in sorted(problem.pattern.branches, key=lambda branch: (branch[1], branch[0])):
        wider = min(math.lcm(base, width), n)
        if wider * min(16, rate) <= n and cost(wider) <= limit:
            base = wider
    # 2. The length worth having, and the longest multiple up to it that fits.
    target = max(base, _WORTHWHILE // row, min(n // _RANGES, _ENOUGH // row))
    if target >= n and cost(n) <= limit:
        return n
    length = base * _most(lambda m: cost(base * m) <= limit, max(1, min(target, n) // base))
    if length == 0:
        # 3. Whole segments take too much: any length will do that fits.
        length = _most(lambda m: cost(m) <= limit, min(base, n))
    if length == 0:
        words = "which the rows of one segment a branch take (w / r of them)"
        raise ValueError(f"expected device_limit of at least {cost(1):,} bytes, {words}, got {limit:,}")
    return length


def _most(fits: Callable[[int], bool], highest: int) -> int:
    """The largest number up to `highest` that fits; 0 if 1 does not."""
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
