"""What a strategy is asked for, and what it may ask for itself. Called with the pool's lock held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

from dilated_attention_pytorch.core.memory.blocks import Allocation, Block, Place, Uses, aligned

Ready = Callable[[Block], bool]


class Exhausted(Exception):
    """No raw memory: the pool's limit or the system's. The pool makes an error for users of it."""


class Source(Protocol):
    """Where a strategy gets raw memory."""

    place: Place

    def node(self) -> int | None:
        """The NUMA node for the caller's memory; None where there is no choice."""

    def allocate(self, size: int, node: int | None = None) -> Allocation:
        """Raw memory; raises `Exhausted`."""

    def free(self, allocation: Allocation, uses: Uses) -> None:
        """Gives raw memory back once its uses are over."""

    def settle(self, block: Block) -> None:
        """Forgets uses that are over."""


class Strategy(ABC):
    """Keeps the free blocks of one place and decides what to take from the system.

    Args:
        source: where raw memory comes from.
    """

    name: ClassVar[str]

    def __init__(self, source: Source) -> None:
        self.source = source

    @abstractmethod
    def find(self, size: int, ready: Ready | None) -> Block | None:
        """Takes a free block of at least `size` bytes; with `ready`, one of those that it accepts."""

    @abstractmethod
    def grow(self, size: int) -> Block:
        """Takes a block from new raw memory; raises `Exhausted`."""

    @abstractmethod
    def give(self, block: Block) -> None:
        """Takes back a block that `find` or `grow` gave."""

    @abstractmethod
    def trim(self) -> None:
        """Gives all raw memory back that no lent block lies in."""

    @abstractmethod
    def free_blocks(self) -> Iterator[Block]:
        """Every free block."""

    def describe(self) -> str:
        """What it is doing, in a line."""
        return self.name

    def allocate(self, wanted: int, least: int) -> Allocation:
        """Raw memory of the wanted size, or of the least where there is no room for it."""
        try:
            return self.source.allocate(wanted)
        except Exhausted:
            if wanted == least:
                raise
            return self.source.allocate(least)


class SizedStrategy(Strategy):
    """One allocation a block, and a list of free blocks for every size class.

    Where there is no room for a block of its class's size, a request gets one of its own size, which then serves those
    requests of the class that fit.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._free: dict[int, list[Block]] = {}

    @abstractmethod
    def rounded(self, size: int) -> int:
        """The size of the block that serves a request."""

    def find(self, size: int, ready: Ready | None) -> Block | None:
        """See `Strategy`."""
        key = self.rounded(size)
        blocks = self._free.get(key, [])
        # Of those to wait for the one released first, whose uses end first; else the last, which caches may still hold.
        order = range(len(blocks)) if ready is None else reversed(range(len(blocks)))
        chosen = next((i for i in order if blocks[i].size >= size and (ready is None or ready(blocks[i]))), None)
        if chosen is None:
            return None
        block = blocks.pop(chosen)
        if not blocks:
            del self._free[key]
        block.free = False
        return block

    def grow(self, size: int) -> Block:
        """See `Strategy`."""
        allocation = self.allocate(self.rounded(size), aligned(size))
        return Block(allocation, 0, allocation.size, self, dict(allocation.uses))

    def give(self, block: Block) -> None:
        """See `Strategy`."""
        assert block.owner is self and not block.free
        block.free = True
        self._free.setdefault(self.rounded(block.size), []).append(block)

    def trim(self) -> None:
        """See `Strategy`."""
        for block in self.free_blocks():
            self.source.free(block.allocation, block.uses)
        self._free.clear()

    def free_blocks(self) -> Iterator[Block]:
        """See `Strategy`."""
        for blocks in self._free.values():
            yield from blocks
