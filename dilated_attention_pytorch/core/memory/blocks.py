"""What a pool is made of: raw memory, the blocks cut from it, and the work that may still touch a block."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes; offsets and sizes of blocks are multiples of it. CUDA's own allocator rounds to it; no dtype needs more.
ALIGNMENT = 512


def aligned(size: int) -> int:
    """The size rounded up to whole units of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Place(NamedTuple):
    """Where memory lies: "cpu", "cpu pinned" or "cuda:0"."""

    device: torch.device
    pinned: bool = False

    def __str__(self) -> str:
        return f"{self.device} pinned" if self.pinned else str(self.device)


class Use(NamedTuple):
    """Work on one stream that may still touch a block."""

    number: int  # counts a place's events, so of two uses the larger number is the later
    event: Any  # recorded behind that work


Uses = dict[Hashable, Use]  # by stream


def merged(a: Uses, b: Uses) -> Uses:
    """The uses of two blocks that become one: the later of each stream."""
    later = {stream: use for stream, use in b.items() if stream not in a or a[stream].number < use.number}
    return {**a, **later}


@dataclass(eq=False, slots=True)
class RawMemory:
    """Memory taken from the system."""

    tensor: Tensor | None  # uint8 (size,); None once it is given back
    size: int  # bytes
    node: int | None = None  # the NUMA node asked for
    uses: Uses = field(default_factory=dict)  # events still pending when torch's allocator handed this memory out
    number: int = field(default_factory=itertools.count().__next__)  # for a fixed order


@dataclass(eq=False, slots=True)
class Block:
    """A part of raw memory, free or lent."""

    raw: RawMemory
    offset: int  # bytes from the start of `raw`
    size: int  # bytes
    uses: Uses
    free: bool = False  # True while a strategy keeps it, False while it is lent
    before: Block | None = None  # the neighbours in `raw`, if a strategy cut several blocks from it
    after: Block | None = None

    @classmethod
    def whole(cls, raw: RawMemory) -> Block:
        """All of some raw memory that was just taken."""
        return cls(raw, 0, raw.size, dict(raw.uses))

    def view(self, size: int) -> Tensor:
        """The block's first bytes, uint8 `(size,)`."""
        assert self.raw.tensor is not None and size <= self.size
        return self.raw.tensor[self.offset : self.offset + size]
