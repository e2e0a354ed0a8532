"""Where the keys that a decoding step sees lie in a buffer of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dilated_attention_pytorch.core.members import ceil_div
from dilated_attention_pytorch.core.pattern import DilatedPattern


@dataclass(frozen=True)
class DecodeLayout:
    """The slots of a key/value buffer `(B, H_kv, rows, D)` for one query at a time.

    A branch shows a query the members of the segment that is open there, so w / r slots per head hold all that it can
    see: position m has slot `(m mod w) // r` of its branch (*compact*). Where branches share most of their keys, a
    *ring* of max(w) rows is smaller: position m has row `m mod rows`. Nothing else depends on the position, so that a
    CUDA graph can read and write the buffer.

    Args:
        pattern: the branches, for the key/value heads.
        longest: number of positions that the sequence may come to.
        shift: segment shift of the layer.
    """

    pattern: DilatedPattern
    longest: int
    shift: int = 0

    @cached_property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """The (length, rate) of each branch, the densest first, which is how kernels walk them."""
        return tuple(sorted(self.pattern.branches, key=lambda branch: (branch[1], -branch[0])))

    @cached_property
    def bases(self) -> tuple[int, ...]:
        """The first slot of each branch in a compact buffer, and behind them the number of slots."""
        bases = [0]
        for length, rate in self.branches:
            bases.append(bases[-1] + ceil_div(min(length, self.longest + self.shift), rate))
        return tuple(bases)

    @cached_property
    def ring(self) -> int:
        """Rows of a ring."""
        return min(max(self.pattern.segment_lengths), self.longest)

    @property
    def compact(self) -> bool:
        """Whether the compact buffer is the smaller one."""
        return self.bases[-1] < self.ring

    @property
    def rows(self) -> int:
        """Rows of the buffer."""
        return self.bases[-1] if self.compact else self.ring

    def write(self, buffer: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Puts what later queries can see into the buffer.

        Args:
            buffer: `(B, H_kv, rows, D)`.
            rows: keys or values `(B, M, H_kv, D)` of consecutive positions, up to the last one before the next query.
            positions: int64 `(B, M)`, each row's own; negative for left padding.
        """
        seen, following = positions >= 0, positions[:, -1:] + 1
        if not self.compact:
            seen = seen & (positions >= following - self.ring)
            b, m = seen.nonzero(as_tuple=True)
            buffer[b, :, positions[b, m] % self.ring] = rows[b, m]
            return
        for (length, rate), base in zip(self.branches, self.bases, strict=False):
            at, branch = positions + self.shift, self.pattern.branches.index((length, rate))
            place, open_here = at % length, seen & (at // length == (following + self.shift) // length)
            for offset, heads in self.pattern.head_groups(branch):
                b, m = (open_here & (place % rate == offset)).nonzero(as_tuple=True)
                slots = (base + place[b, m] // rate)[:, None]
                chosen = torch.arange(self.pattern.num_heads, device=rows.device)[heads][None, :]
                buffer[b[:, None], chosen, slots] = rows[b[:, None], m[:, None], chosen]
