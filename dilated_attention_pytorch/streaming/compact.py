"""The rows of one branch and offset, put side by side.

Slot j of segment s lands at `s * slots + j`. The map keeps the order of positions, so what was a branch (w, r) over the
sequence is a branch (slots, 1) over the compact rows, causal or not, whether or not r divides w. A segment that is too
long for a range is therefore attention over few rows that lie densely, computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem


@dataclass(frozen=True, eq=False)
class CompactBranch:
    """What the heads of one offset keep in one branch.

    Attributes:
        pattern: the pattern, for the key/value heads.
        branch: which branch.
        offset: the residue.
        heads: the key/value heads that keep it.
        seq_len: N.
    """

    pattern: DilatedPattern
    branch: int
    offset: int
    heads: slice
    seq_len: int

    @property
    def length(self) -> int:
        """Positions of a segment."""
        return self.pattern.segment_lengths[self.branch]

    @property
    def slots(self) -> int:
        """Rows of a whole segment."""
        return self.pattern.slots(self.branch, self.offset)

    @property
    def num_heads(self) -> int:
        """How many key/value heads share the rows."""
        return len(range(*self.heads.indices(self.pattern.num_heads)))

    def index(self, position: int) -> int:
        """How many rows lie before a position."""
        segment, within = divmod(min(position, self.seq_len), self.length)
        rate = self.pattern.dilation_rates[self.branch]
        return segment * self.slots + min(max(0, -(-(within - self.offset) // rate)), self.slots)

    def count(self, start: int, stop: int) -> int:
        """How many rows lie in `[start, stop)`."""
        return max(0, self.index(stop) - self.index(start))

    def beginning_in(self, start: int, stop: int) -> tuple[int, int]:
        """The positions `[first, last)` of the segments that begin in `[start, stop)`; empty where none does."""
        first, last = -(-start // self.length), -(-stop // self.length)
        return first * self.length, max(first * self.length, min(last * self.length, self.seq_len))

    def problem(self, rows: int, is_causal: bool, scale: float) -> Problem:
        """Attention of so many compact rows, from a segment's begin on."""
        pattern = DilatedPattern((self.slots,), (1,), self.num_heads)
        return Problem(pattern, is_causal, scale, 0.0, 0, 0, rows, "exact", "none")

    def select(self, x: Tensor) -> Tensor:
        """The heads' part of x `(B, n, H, ...)` as `(B, n, h, G, ...)`, a view; `(B, n)` has no heads and stays."""
        return x if x.dim() == 2 else x.unflatten(2, (self.pattern.num_heads, -1))[:, :, self.heads]

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
        x = self.select(x)
        rate, row = self.pattern.dilation_rates[self.branch], x.stride(1)
        at = self.index(start) - self.index(compact_start)
        for span in self.pattern.spans(self.branch, self.offset, (start, stop), (start, stop)):
            shape = (span.num_segments, span.q_hi - span.q_lo)
            rows = shape[0] * shape[1]
            if rows == 0:
                continue
            first = span.first_segment * self.length + self.offset + span.q_lo * rate - x_start
            view = x.as_strided(
                (x.shape[0], *shape, *x.shape[2:]),
                (x.stride(0), self.length * row, rate * row, *x.stride()[2:]),
                x.storage_offset() + first * row,
            )
            yield view, compact[:, at : at + rows].unflatten(1, shape)
            at += rows

    def gather(self, x: Tensor, x_start: int, start: int, stop: int, out: Tensor) -> None:
        """Copies the rows in `[start, stop)` of x into `out` `(B, L, h, G, ...)`, side by side."""
        for rows, beside in self.pairs(x, x_start, out, start, start, stop):
            beside.copy_(rows)

    def empty(self, x: Tensor, rows: int) -> Tensor:
        """Room for so many rows of x, on its device."""
        return torch.empty(self.shape(tuple(x.shape), rows), dtype=x.dtype, device=x.device)

    def shape(self, shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
        """The shape of so many compact rows of a tensor `(B, n, H, ...)` or `(B, n)`."""
        if len(shape) == 2:
            return shape[0], rows
        return shape[0], rows, self.num_heads, shape[2] // self.pattern.num_heads, *shape[3:]


def compact_branches(pattern: DilatedPattern, branch: int, seq_len: int) -> list[CompactBranch]:
    """A branch by the offsets its heads keep, those that keep nothing left out."""
    found = [CompactBranch(pattern, branch, offset, heads, seq_len) for offset, heads in pattern.head_groups(branch)]
    return [x for x in found if x.slots > 0]
