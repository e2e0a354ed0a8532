"""What a pool is made of: raw allocations, the blocks cut from them, and who used a block last."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dilated_attention_pytorch.core.memory.strategies.base import Strategy

# Offsets and sizes of blocks are multiples of it: what CUDA's own allocator rounds to, and more than any dtype needs.
ALIGNMENT = 512


def aligned(size: int) -> int:
    """The size rounded up to whole units of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Place(NamedTuple):
    """Where memory lies."""

    device: torch.device
    pinned: bool = False

    def __str__(self) -> str:
        return f"{self.device} pinned" if self.pinned else str(self.device)


class Use(NamedTuple):
    """Work on a stream that may still touch a block.

    Attributes:
        event: recorded behind that work.
        number: counts events, so that the later of two on one stream is known.
    """

    event: Any
    number: int


Uses = dict[Hashable, Use]  # by stream


def merged(a: Mapping[Hashable, Use], b: Mapping[Hashable, Use]) -> Uses:
    """The uses of two blocks that become one: of each stream the later."""
    both = dict(a)
    for stream, use in b.items():
        if stream not in both or both[stream].number < use.number:
            both[stream] = use
    return both


@dataclass(eq=False, slots=True)
class Allocation:
    """Memory taken from the system.

    Attributes:
        tensor: flat uint8; None in a simulation, which needs the arithmetic alone.
        size: bytes.
        node: the NUMA node asked for, None where nothing was.
        uses: work queued on memory that torch handed out before it was done, as its allocator does on one stream.
        number: allocations in the order they were made.
    """

    tensor: Tensor | None
    size: int
    node: int | None = None
    uses: Uses = field(default_factory=dict)
    number: int = field(default_factory=itertools.count().__next__)


@dataclass(eq=False, slots=True)
class Block:
    """A part of an allocation, free or lent.

    Attributes:
        allocation: what it is cut from.
        offset: bytes from the allocation's start.
        size: bytes.
        owner: the strategy that cut it, which alone takes it back.
        uses: work that may still touch it.
        free: whether the strategy holds it.
        before, after: neighbours in the same allocation, where a strategy cuts several from one.
    """

    allocation: Allocation
    offset: int
    size: int
    owner: Strategy
    uses: Uses
    free: bool = False
    before: Block | None = None
    after: Block | None = None

    def view(self, size: int) -> Tensor:
        """Its first bytes, flat uint8."""
        assert self.allocation.tensor is not None and size <= self.size
        return self.allocation.tensor[self.offset : self.offset + size]
