"""The rows of one branch and offset, put side by side (`core.members`).

A branch (w, r) over the sequence is a branch (slots, 1) over its compact rows. A segment that is too long for a range
is therefore attention over few rows that lie densely, computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dilated_attention_pytorch.core.members import Members, ceil_div
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem


@dataclass(frozen=True, eq=False)
class CompactBranch:
    """What the heads of one offset keep in one branch.

    Attributes:
        pattern: the pattern, for the key/value heads.
        branch: which branch.
        members: the positions kept.
        heads: the key/value heads that keep them.
        seq_len: N.
    """

    pattern: DilatedPattern
    branch: int
    members: Members
    heads: slice
    seq_len: int

    @property
    def num_heads(self) -> int:
        """How many key/value heads share the rows."""
        return len(range(*self.heads.indices(self.pattern.num_heads)))

    def count(self, start: int, stop: int) -> int:
        """How many rows lie in `[start, stop)`, as far as the sequence goes."""
        start, stop = min(start, self.seq_len), min(stop, self.seq_len)
        return max(0, self.members.before(stop) - self.members.before(start))

    def beginning_in(self, start: int, stop: int) -> tuple[int, int]:
        """The positions `[first, last)` of the segments that begin in `[start, stop)`; empty if none does."""
        length = self.members.length
        first, last = ceil_div(start, length) * length, ceil_div(stop, length) * length
        return first, max(first, min(last, self.seq_len))

    def problem(self, whole: Problem, rows: int) -> Problem:
        """Attention of so many compact rows, from the beginning of a segment on."""
        pattern = DilatedPattern((self.members.slots,), (1,), self.num_heads)
        return Problem(pattern, whole.is_causal, whole.scale, seq_len=rows)

    def pairs(
        self, x: Tensor, x_start: int, compact: Tensor, compact_start: int, start: int, stop: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the rows in `[start, stop)`, where they lie in the sequence and where they lie side by side.

        Args:
            x: `(B, n, H, ...)` or `(B, n)`, positions from `x_start` on.
            compact: `(B, L, h, G, ...)` or `(B, L)`, rows of the positions from `compact_start` on.

        Yields:
            At most three pairs of shape `(B, segments, slots, ...)`, none of them empty.
        """
        if x.dim() > 2:  # (B, n, H, ...) -> (B, n, h, G, ...), a view
            x = x.unflatten(2, (self.pattern.num_heads, -1))[:, :, self.heads]
        (length, rate, offset), row = self.members, x.stride(1)
        at = self.count(compact_start, start)  # row of compact
        for span in self.pattern.spans(self.branch, offset, (start, stop), (start, stop)):
            segments, slots = span.num_segments, span.q_hi - span.q_lo
            if slots == 0:
                continue
            # Slot j of segment s lies at s * w + o + j * r.
            first = span.first_segment * length + offset + span.q_lo * rate - x_start
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


def compact_branches(pattern: DilatedPattern, branch: int, seq_len: int) -> list[CompactBranch]:
    """One per offset that the heads of a branch keep; offsets of which no position exists are left out."""
    groups = [(pattern.members(branch, offset), heads) for offset, heads in pattern.head_groups(branch)]
    return [CompactBranch(pattern, branch, members, heads, seq_len) for members, heads in groups if members.slots]
