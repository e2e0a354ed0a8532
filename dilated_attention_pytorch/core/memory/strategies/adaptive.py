"""Chooses among the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from dilated_attention_pytorch.core.memory.blocks import Allocation, Block, Place, Uses
from dilated_attention_pytorch.core.memory.stats import mib
from dilated_attention_pytorch.core.memory.strategies.base import Ready, Source, Strategy
from dilated_attention_pytorch.core.memory.strategies.bucketed import BucketedStrategy
from dilated_attention_pytorch.core.memory.strategies.fragment_aware import FragmentAwareStrategy
from dilated_attention_pytorch.core.memory.strategies.numa import NumaStrategy
from dilated_attention_pytorch.core.memory.strategies.simple import SimpleStrategy

_FIRST_WINDOW, _LAST_WINDOW = 64, 1024  # borrows to watch before thinking
_REST = 4  # windows between two looks, so that thinking stays a small part of the work
_WORTH_IT = 0.9  # of what is reserved now: a change has to save more than the noise between two windows

# By the work of one request, the least first.
_CANDIDATES: tuple[type[Strategy], ...] = (SimpleStrategy, BucketedStrategy, FragmentAwareStrategy)


class AdaptiveStrategy(Strategy):
    """Plays the sizes and lifetimes it has seen through the others, without memory, and takes what holds least.

    It begins as `fragment_aware`, looks at the first 64 borrows and from then on at a fifth of them, in ever longer
    spans up to 1,024, and changes when another strategy would have reserved less than nine tenths: of those within a
    tenth of the least, the one with the least work. Blocks that are lent when it changes go back to the strategy that
    cut them, which gives them up. Host memory on a host with several NUMA nodes is `numa`'s without thinking.
    `describe` says what was chosen and why.

    Measured (`benchmarks/pool.py`, CPU): it reserved what the best fixed choice did on all loads but the fixed set,
    where it held 10% more than `simple`, and took up to 1.45 times the best one's time. It wins against a wrong
    choice, not against the right one.
    """

    name: ClassVar[str] = "adaptive"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        on_nodes = source.node() is not None
        self._inner: Strategy = NumaStrategy(source) if on_nodes else FragmentAwareStrategy(source)
        self._left: list[Strategy] = []  # strategies that were left while blocks of theirs were lent
        self._trace: list[tuple[int, int]] = []  # (name of a block, size borrowed or 0 for given back)
        self._names: dict[Block, int] = {}
        self._borrows, self._next = 0, 0
        self._window, self._rest = _FIRST_WINDOW, 0
        self._why = "memory of several NUMA nodes" if on_nodes else "nothing seen yet"

    def find(self, size: int, ready: Ready | None) -> Block | None:
        """See `Strategy`."""
        block = self._inner.find(size, ready)
        return block if block is None else self._noted(block, size)

    def grow(self, size: int) -> Block:
        """See `Strategy`."""
        return self._noted(self._inner.grow(size), size)

    def give(self, block: Block) -> None:
        """See `Strategy`."""
        name = self._names.pop(block)
        if self._rest == 0:
            self._trace.append((name, 0))
        block.owner.give(block)
        if self._left:
            for old in self._left:
                old.trim()
            self._left = [old for old in self._left if any(b.owner is old for b in self._names)]
        if self._borrows >= self._window:
            self._think()

    def trim(self) -> None:
        """See `Strategy`."""
        for strategy in (self._inner, *self._left):
            strategy.trim()

    def free_blocks(self) -> Iterator[Block]:
        """See `Strategy`."""
        for strategy in (self._inner, *self._left):
            yield from strategy.free_blocks()

    def describe(self) -> str:
        """See `Strategy`."""
        return f"{self.name}: {self._inner.describe()}; {self._why}"

    def _noted(self, block: Block, size: int) -> Block:
        self._names[block] = self._next
        self._next += 1
        if self._rest:
            self._rest -= 1
        else:
            self._trace.append((self._next - 1, size))
            self._borrows += 1
        return block

    def _think(self) -> None:
        trace, self._trace, seen = self._trace, [], self._borrows
        self._borrows, self._rest = 0, _REST * self._window
        self._window = min(2 * self._window, _LAST_WINDOW)
        if isinstance(self._inner, NumaStrategy):
            return
        held = {kind: simulate(kind, trace) for kind in _CANDIDATES}
        least = min(held.values())
        best = next(kind for kind in _CANDIDATES if _WORTH_IT * held[kind] <= least)
        sizes = len({size for _, size in trace if size})
        figures = ", ".join(f"{kind.name} {mib(held[kind])}" for kind in _CANDIDATES)
        self._why = (
            f"of the last {seen} borrows, of {sizes} sizes and {lifetime(trace)} borrows long, would hold: {figures}"
        )
        if held[best] < _WORTH_IT * held[type(self._inner)]:
            self._inner.trim()
            if self._names:
                self._left.append(self._inner)
            self._inner = best(self.source)


def simulate(kind: type[Strategy], trace: list[tuple[int, int]]) -> int:
    """Bytes that a strategy, begun empty, would have reserved at the end of a trace; without blocks lent before."""
    source = _Paper()
    strategy, lent = kind(source), dict[int, Block]()
    for name, size in trace:
        if size:
            lent[name] = strategy.find(size, lambda _: True) or strategy.grow(size)
        elif name in lent:
            strategy.give(lent.pop(name))
    return source.reserved


def lifetime(trace: list[tuple[int, int]]) -> int:
    """The median number of borrows between a block's borrow and its return; of blocks that returned."""
    begun: dict[int, int] = {}
    lives = []
    borrows = 0
    for name, size in trace:
        if size:
            begun[name] = borrows
            borrows += 1
        elif name in begun:
            lives.append(borrows - begun[name] - 1)
    return sorted(lives)[len(lives) // 2] if lives else 0


class _Paper:
    """A source of numbers."""

    place = Place(device=None)  # type: ignore[arg-type]  # nothing lies anywhere

    def __init__(self) -> None:
        self.reserved = 0

    def node(self) -> int | None:
        return None

    def allocate(self, size: int, node: int | None = None) -> Allocation:
        self.reserved += size
        return Allocation(None, size)

    def free(self, allocation: Allocation, uses: Uses) -> None:
        self.reserved -= allocation.size

    def settle(self, block: Block) -> None:
        pass
