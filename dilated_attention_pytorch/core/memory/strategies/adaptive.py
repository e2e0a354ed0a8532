"""Exact sizes while they are few, slabs once they vary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from typing_extensions import override

from dilated_attention_pytorch.core.memory.blocks import Block, aligned
from dilated_attention_pytorch.core.memory.stats import mib
from dilated_attention_pytorch.core.memory.strategies.base import Ready, Source, Strategy
from dilated_attention_pytorch.core.memory.strategies.fragment_aware import FragmentAwareStrategy
from dilated_attention_pytorch.core.memory.strategies.numa import NumaStrategy
from dilated_attention_pytorch.core.memory.strategies.simple import SimpleStrategy

_SLACK = 1.1  # bytes held per byte lent at the peak; the docs call strategies equal within this tenth


class AdaptiveStrategy(Strategy):
    """`simple` as long as sizes are held together, `fragment_aware` from the first request that shows otherwise.

    The rule: `simple` holds, of each size, as many blocks as were ever lent at once. That may be a tenth more than the
    most bytes of all sizes that were lent at once. A request that would take it beyond is served by `fragment_aware`,
    as are all later ones. So a fixed set costs exactly its bytes, and sizes that wobble or take turns, which `simple`
    hoards, cost no more than their slabs. Blocks that are lent at the change go back to the system as they return. A
    `trim` that finds nothing lent begins anew. Host memory on a host with several NUMA nodes is always `numa`'s.

    Measured (`benchmarks/pool.py`, CPU): on each load it ends as the strategy that holds least, or as one within a
    tenth of it; a test holds it to that. On many sizes it reserved 35 MiB, where `fragment_aware` from the start held
    30: the first choice's last blocks and the first slabs overlap.
    """

    name: ClassVar[str] = "adaptive"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._lent: dict[Block, Strategy] = {}  # with the strategy that takes the block back
        self._begin()

    def _begin(self) -> None:
        self._inner: Strategy = SimpleStrategy(self.source)
        self._why = "nothing seen yet"
        # What `simple` was asked for. By size: blocks lent now, and the most at once; in bytes: their sums.
        self._live, self._need = Counter[int](), Counter[int]()
        self._now = self._most = self._exact = 0
        if self.source.node() is not None:
            self._inner, self._why = NumaStrategy(self.source), "memory of several NUMA nodes"

    @override
    def find(self, size: int, ready: Ready | None) -> Block | None:
        block = self._inner.find(size, ready)
        return block if block is None else self._lend(block)

    @override
    def grow(self, size: int) -> Block:
        if isinstance(self._inner, SimpleStrategy):
            self._judge(aligned(size))
        return self._lend(self._inner.grow(size))

    def _judge(self, size: int) -> None:
        """Leaves `simple` if one more block of `size` bytes is more than the rule allows."""
        exact = self._exact + (size if self._live[size] == self._need[size] else 0)
        most = max(self._most, self._now + size)
        self._why = f"exact sizes take {mib(exact)} where at most {mib(most)} were lent at once"
        if exact > _SLACK * most:
            self._inner.trim()
            # As much will be lent again; as far as `simple`'s own blocks do not still hold it.
            self._inner = FragmentAwareStrategy(self.source, first=most - self._now)

    def _lend(self, block: Block) -> Block:
        self._lent[block] = self._inner
        if isinstance(self._inner, SimpleStrategy):
            size = block.size
            self._now += size
            self._most = max(self._most, self._now)
            self._live[size] += 1
            if self._live[size] > self._need[size]:
                self._need[size] += 1
                self._exact += size
        return block

    @override
    def give(self, block: Block) -> None:
        owner = self._lent.pop(block)
        if isinstance(owner, SimpleStrategy):
            self._now -= block.size
            self._live[block.size] -= 1
        owner.give(block)
        if owner is not self._inner:
            owner.trim()

    @override
    def trim(self) -> None:
        self._inner.trim()
        self._need, self._exact = self._live.copy(), self._now
        if not self._lent and not isinstance(self._inner, NumaStrategy):
            self._begin()

    @override
    def free_blocks(self) -> Iterator[Block]:
        return self._inner.free_blocks()

    @override
    def describe(self) -> str:
        """The strategy chosen, and why."""
        return f"{self.name}: {self._inner.describe()}; {self._why}"
