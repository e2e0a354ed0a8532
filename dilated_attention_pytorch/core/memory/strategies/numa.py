"""Memory on the caller's NUMA node."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from typing_extensions import override

from dilated_attention_pytorch.core.memory import topology
from dilated_attention_pytorch.core.memory.blocks import Block
from dilated_attention_pytorch.core.memory.strategies.base import Source
from dilated_attention_pytorch.core.memory.strategies.bucketed import BucketedStrategy


class NumaStrategy(BucketedStrategy):
    """`bucketed`, with host memory on the node that the CUDA device hangs on, or else that the caller runs on.

    For page-locked staging on hosts with several nodes. A thread bound to the node touches the pages first, and the
    kernel's map is read to see where they went. With one node, and for device memory, there is nothing to place.

    Not measured yet: its load needs a host with several nodes. On one node it is `bucketed` with a little more work.
    """

    name: ClassVar[str] = "numa"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        # Pages by the node asked for and the node found; None: an allocation that the kernel's map does not show.
        self._pages: Counter[tuple[int, int | None]] = Counter()

    @override
    def node(self) -> int | None:
        return self.source.node()

    @override
    def grow(self, size: int) -> Block:
        block = super().grow(size)
        node, tensor = block.raw.node, block.raw.tensor
        if node is not None and tensor is not None:
            found = topology.pages_by_node(tensor.data_ptr())
            self._pages.update({(node, where): pages for where, pages in found.items()} if found else {(node, None): 1})
        return block

    @override
    def describe(self) -> str:
        if not self._pages:
            return f"{self.name}: nothing to place (one node, or not host memory), so as bucketed"
        nodes = sorted({asked for asked, _ in self._pages})
        right = sum(self._pages[node, node] for node in nodes)
        unknown = sum(self._pages[node, None] for node in nodes)
        return (
            f"{self.name}: nodes {nodes}; of {self._pages.total() - unknown} pages that the kernel reports, "
            f"{right} lie where asked; {unknown} allocations it does not report"
        )
