"""The membership rule of LongNet (arXiv 2307.02486, section 2.2): the only place outside kernels that has it.

Position n belongs to a branch (w, r) at offset o when `(n mod w) mod r == o`. Members keep their order when they are
put side by side: slot j of segment s stands at `s * slots + j`, so that what was a branch (w, r) over the sequence is a
branch (slots, 1) over its members, causal or not, whether or not r divides w.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up."""
    return (a + b - 1) // b  # not -(-a // b): ONNX rounds the quotient of integers towards 0


class Members(NamedTuple):
    """The positions that one offset of a branch keeps.

    Attributes:
        length: w, positions per segment.
        rate: r.
        offset: o, the residue.
    """

    length: int
    rate: int
    offset: int

    @property
    def slots(self) -> int:
        """How many a whole segment has."""
        return max(0, ceil_div(self.length - self.offset, self.rate))

    def before(self, position: int) -> int:
        """How many stand before a position."""
        if self.length % self.rate == 0:  # equally far apart; a tracer then knows how many there are
            return max(0, ceil_div(position - self.offset, self.rate))
        inside = position % self.length  # Dynamo cannot trace divmod
        return position // self.length * self.slots + max(0, ceil_div(inside - self.offset, self.rate))

    def of(self, positions: Tensor) -> Tensor:
        """True for the positions that are members; negative positions (left padding) are not."""
        length, rate, offset = self  # torch 2.9 traces no arithmetic of tensors with attributes of a NamedTuple
        return (positions % length % rate == offset) & (positions >= 0)

    def rows(self, start: int, count: int, device: torch.device) -> slice | Tensor:
        """Their rows in a tensor of the positions `[start, start + count)`."""
        if self.length % self.rate == 0:  # then they are equally far apart, and a view takes them
            # torch adds the step to the end before it divides, in 64 bits.
            return slice((self.offset - start) % self.rate, count, min(self.rate, 1 << 62))
        # Counted, not searched for: nothing here waits for the device.
        members = torch.arange(self.before(start), self.before(start + count), device=device)
        length, rate, offset = self
        slots = ceil_div(length - offset, rate)
        return members // slots * length + members % slots * rate + offset - start


def keys_behind(own: Tensor, branch: tuple[int, int], shift: int, offsets: Tensor, steps: Tensor) -> Tensor:
    """Which keys `steps` (S,) times a branch's rate back the queries at positions `own` (B,) see: bool `(B, heads, S)`.

    Args:
        own: int64, in each row's own sequence.
        branch: w and r.
        shift: segment shift.
        offsets: int64 `(heads,)`.
        steps: int64 `(S,)`, 0 for the query's own key.
    """
    length, rate = branch
    place = (own + shift) % length
    # A first segment that the shift has cut begins at position 0.
    near = steps * rate <= torch.minimum(place, own)[:, None]
    return (place[:, None] % rate == offsets)[:, :, None] & near[:, None]


def segment_and_residue(positions: Tensor, length: int, rate: int) -> Tensor:
    """One number per (segment, residue) of a branch: positions with the same number see one another."""
    return positions // length * rate + positions % length % rate
