"""One arena a NUMA node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from dilated_attention_pytorch.core.memory import topology
from dilated_attention_pytorch.core.memory.blocks import Allocation, Block, Place, Uses
from dilated_attention_pytorch.core.memory.strategies.base import Ready, Source, Strategy
from dilated_attention_pytorch.core.memory.strategies.bucketed import BucketedStrategy


class NumaStrategy(Strategy):
    """Host memory on the node that the CUDA device hangs on, or that the caller runs on; `bucketed` within each node.

    For page-locked staging on hosts with several nodes: pages are first touched by a thread bound to the node, and
    the kernel's map is read to see where they went. With one node, and for device memory, it places nothing and is
    `bucketed`.

    Its load needs several nodes, and no such host has measured it: it has won nothing yet. On one node it is `bucketed`
    with a little more work.
    """

    name: ClassVar[str] = "numa"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._nodes: dict[int | None, BucketedStrategy] = {}
        self._pages: Counter[tuple[int, int | None]] = Counter()  # (asked for, found): pages; None: not known

    def find(self, size: int, ready: Ready | None) -> Block | None:
        """See `Strategy`."""
        return self._here().find(size, ready)

    def grow(self, size: int) -> Block:
        """See `Strategy`."""
        block = self._here().grow(size)
        node, tensor = block.allocation.node, block.allocation.tensor
        if node is not None and tensor is not None:
            found = topology.pages_by_node(tensor.data_ptr())
            if found is None:
                self._pages[node, None] += 1
            else:
                for where, pages in found.items():
                    self._pages[node, where] += pages
        return block

    def give(self, block: Block) -> None:
        """See `Strategy`."""
        block.owner.give(block)

    def trim(self) -> None:
        """See `Strategy`."""
        for inner in self._nodes.values():
            inner.trim()

    def free_blocks(self) -> Iterator[Block]:
        """See `Strategy`."""
        for inner in self._nodes.values():
            yield from inner.free_blocks()

    def describe(self) -> str:
        """See `Strategy`."""
        if not set(self._nodes) - {None}:
            return f"{self.name}: nothing to place (one node, or not host memory), so as bucketed"
        checked = sum(n for (_, where), n in self._pages.items() if where is not None)
        right = sum(n for (node, where), n in self._pages.items() if node == where)
        unknown = sum(n for (_, where), n in self._pages.items() if where is None)
        return (
            f"{self.name}: nodes {sorted(n for n in self._nodes if n is not None)}; of {checked} pages that the kernel "
            f"reports, {right} lie where asked; {unknown} allocations it does not report"
        )

    def _here(self) -> BucketedStrategy:
        node = self.source.node()
        if node not in self._nodes:
            self._nodes[node] = BucketedStrategy(_OnNode(self.source, node))
        return self._nodes[node]


class _OnNode:
    """A source whose memory lies on one node."""

    def __init__(self, source: Source, node: int | None) -> None:
        self._source = source
        self._node = node
        self.place: Place = source.place

    def node(self) -> int | None:
        return self._node

    def allocate(self, size: int, node: int | None = None) -> Allocation:
        return self._source.allocate(size, self._node)

    def free(self, allocation: Allocation, uses: Uses) -> None:
        self._source.free(allocation, uses)

    def settle(self, block: Block) -> None:
        self._source.settle(block)
