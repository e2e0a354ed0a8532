"""What a pool asks of a strategy, and what a strategy may ask of its arena. The pool's lock is held throughout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

from typing_extensions import override

from dilated_attention_pytorch.core.memory.blocks import Block, RawMemory, Uses, aligned

Ready = Callable[[Block], bool]


class Exhausted(Exception):
    """The pool's limit or the system leaves no raw memory; the pool raises `PoolExhausted` for its users."""


class Source(Protocol):
    """Where a strategy gets raw memory."""

    def node(self) -> int | None:
        """The NUMA node for the caller's memory; None if there is no choice."""

    def allocate(self, size: int, node: int | None = None) -> RawMemory:
        """Raw memory of `size` bytes; raises `Exhausted`."""

    def free(self, raw: RawMemory, uses: Uses) -> None:
        """Gives raw memory back once its uses are over."""

    def settle(self, block: Block) -> None:
        """Forgets the block's uses that are over."""


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
        """Gives back all raw memory in which no block is lent."""

    @abstractmethod
    def free_blocks(self) -> Iterator[Block]:
        """Every free block."""

    def describe(self) -> str:
        """One line on what the strategy is doing."""
        return self.name

    def allocate(self, wanted: int, least: int, node: int | None = None) -> RawMemory:
        """Raw memory of the wanted size, or of the least if there is no room for that."""
        try:
            return self.source.allocate(wanted, node)
        except Exhausted:
            if wanted == least:
                raise
            return self.source.allocate(least, node)


class SizedStrategy(Strategy):
    """One block per allocation, and a list of free blocks for each size class.

    If there is no room for a block of its class's size, a request gets one of its own size, which then serves those
    requests of the class that fit.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._free: dict[tuple[int | None, int], list[Block]] = {}  # by node and size class

    @abstractmethod
    def rounded(self, size: int) -> int:
        """The size, in bytes, of the class that serves a request."""

    def node(self) -> int | None:
        """The NUMA node whose blocks serve the caller; None if any do."""
        return None

    @override
    def find(self, size: int, ready: Ready | None) -> Block | None:
        blocks = self._free.get((self.node(), self.rounded(size)), [])
        # With `ready` the block released last, which caches may still hold; else the first, whose uses end first.
        order = range(len(blocks)) if ready is None else reversed(range(len(blocks)))
        for i in order:
            if blocks[i].size >= size and (ready is None or ready(blocks[i])):
                blocks[i].free = False
                return blocks.pop(i)
        return None

    @override
    def grow(self, size: int) -> Block:
        return Block.whole(self.allocate(self.rounded(size), aligned(size), self.node()))

    @override
    def give(self, block: Block) -> None:
        assert not block.free
        block.free = True
        self._free.setdefault((block.raw.node, self.rounded(block.size)), []).append(block)

    @override
    def trim(self) -> None:
        for block in self.free_blocks():
            self.source.free(block.raw, block.uses)
        self._free.clear()

    @override
    def free_blocks(self) -> Iterator[Block]:
        for blocks in self._free.values():
            yield from blocks
